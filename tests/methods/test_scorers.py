from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lightning_influence.curvature.coarse_space import build_directions
from lightning_influence.curvature.factors import Eigenbasis
from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.curvature.two_level import Correction
from lightning_influence.methods import scorers as scoring
from lightning_influence.methods.scorers import DenseScorer, PreconditionedScorer
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, LayerGradients
from lightning_influence.model.layers.plan import Layout

# Large enough for the low-rank route to pay, with a small layer for which it does not.
SHAPES = {"wide": (1, 64, 65), "square": (1, 48, 49), "small": (1, 3, 4)}
Q, M, B = 60, 20, 40


class Problem:
    """Gradients whose energy is what the eigenvalues say, in random bases, and training gradients by row."""

    def __init__(self, dtype: torch.dtype = torch.float32, damping: float = 1e-3) -> None:
        self.dtype, self.layout = dtype, Layout(SHAPES)
        self.energies, layers = {}, {}
        for name, (_, d_out, d_in) in SHAPES.items():
            rows, columns = (torch.logspace(0, -4, d, dtype=torch.float64) for d in (d_out, d_in))
            basis = Eigenbasis.of_vectors(
                *(torch.linalg.qr(torch.randn(1, d, d, dtype=torch.float64)).Q for d in (d_in, d_out))
            )
            self.energies[name] = rows, columns, basis
            # As smooth as spectra are, and no outer product.
            bend = 1 + 0.3 * torch.cos(
                3 * torch.outer(torch.linspace(0, 1, d_out), torch.linspace(0, 1, d_in))
            )
            layers[name] = EigenInverse(basis, (rows[:, None] * columns * bend)[None], damping).to(
                dtype=dtype
            )
        self.inverse = BlockInverse(self.layout, layers)
        self.queries, self.anchors, self.train = self.draw(Q), self.draw(M), self.draw(B)

    def redamped(self, damping: float) -> BlockInverse:
        layers = self.inverse.layers.items()
        return BlockInverse(
            self.layout, {k: EigenInverse(v.basis, v.eigenvalues, damping) for k, v in layers}
        )

    def draw(self, count: int, positions: int = 1) -> dict[str, LayerGradients]:
        result = {}
        for name, (rows, columns, basis) in self.energies.items():
            a = torch.randn(1, count, positions, len(columns), dtype=torch.float64) * columns.sqrt()
            d = torch.randn(1, 1, count, positions, len(rows), dtype=torch.float64) * rows.sqrt()
            result[name] = FactoredGradients(a @ basis.q_in[:, None].mT, d @ basis.q_out[:, None].mT).to(
                dtype=self.dtype
            )
        return result

    def correction(self) -> Correction:
        Q_, mixing = build_directions(self.layout, self.inverse, self.anchors)
        coefficients = torch.randn(Q, len(Q_), dtype=torch.float64).to(self.dtype)
        solved = self.inverse.apply(self.layout.dense(self.queries)[0])
        coefficients *= 0.3 * solved.norm(dim=1, keepdim=True) / coefficients.norm(dim=1, keepdim=True)
        return Correction(coefficients, Q_, mixing, self.anchors, self.inverse)

    def exact(
        self,
        inverse: BlockInverse,
        correction: Correction | None = None,
        train: Mapping[str, LayerGradients] | None = None,
    ) -> Tensor:
        """From flat vectors, in float64."""
        double = BlockInverse(self.layout, {k: v.to(dtype=torch.float64) for k, v in inverse.layers.items()})
        solved = double.apply(self.layout.dense(self.queries)[0].double())
        if correction is not None:
            solved = solved + correction.coefficients.double() @ correction.directions.double()
        return solved @ self.layout.dense(train or self.train)[0].double().T


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("corrected", [False, True])
def test_low_rank_scores_are_within_the_tolerance(tolerance, corrected):
    p = Problem()
    correction = p.correction() if corrected else None
    scorer = PreconditionedScorer(p.inverse, p.queries, correction=correction, tolerance=tolerance)
    assert {"wide", "small"} - set(scorer.ranks) == {"small"}
    got = scorer(p.train)
    assert got.shape == (Q, B)
    # The tolerance is each layer's on the first pairs; three layers and other pairs get twice that.
    assert error(got, p.exact(p.inverse, correction)) < 2 * tolerance
    more = p.draw(B)
    assert error(scorer(more), p.exact(p.inverse, correction, more)) < 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("corrected", [False, True])
def test_tolerance_zero_is_exact(dtype, corrected):
    p = Problem(dtype)
    correction = p.correction() if corrected else None
    scorer = PreconditionedScorer(p.inverse, p.queries, correction=correction, tolerance=0)
    assert scorer.ranks == {}
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    assert error(scorer(p.train), p.exact(p.inverse, correction)) < rounding


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("tolerance", [0, 1e-2])
def test_parts_of_layers_are_those_of_the_exact_scores(tolerance, corrected):
    """Each layer's part by itself, low-rank or not: what is left when all other gradients are zero."""
    p = Problem(torch.float64)
    correction = p.correction() if corrected else None
    scorer = PreconditionedScorer(p.inverse, p.queries, correction=correction, tolerance=tolerance)
    parts = scorer.by_layer(p.train)
    assert ("wide" in scorer.ranks) == (tolerance > 0)
    torch.testing.assert_close(sum(parts.values()), scorer(p.train), rtol=1e-9, atol=1e-12)
    for name, part in parts.items():
        alone = {k: v if k == name else v.scaled(0.0) for k, v in p.train.items()}
        assert error(part, p.exact(p.inverse, correction, alone)) < (3 * tolerance or 1e-12), name


def test_correction_made_with_another_damping():
    p = Problem(torch.float64)
    correction, other = p.correction(), p.redamped(0.05)
    scorer = PreconditionedScorer(other, p.queries, correction=correction, tolerance=1e-3)
    before = dict(scorer.ranks)
    assert error(scorer(p.train), p.exact(other, correction)) < 2e-3
    assert scorer.ranks == before != {}  # right at once, not saved by the check of the first batch


def test_rank_follows_the_tolerance():
    p = Problem(torch.float64)
    ranks = [
        PreconditionedScorer(p.inverse, p.queries, tolerance=t).ranks["wide"] for t in (1e-1, 1e-2, 1e-3)
    ]
    assert ranks == sorted(set(ranks))


def test_layers_where_it_does_not_pay_stay_exact():
    p = Problem()
    few = {k: g.select(slice(0, 1)) for k, g in p.queries.items()}
    assert "small" not in PreconditionedScorer(p.inverse, few).ranks
    many = {k: DenseGradients(g.dense()) for k, g in p.queries.items()}
    assert PreconditionedScorer(p.inverse, many).ranks == {}
    several = p.draw(Q, positions=2)
    assert PreconditionedScorer(p.inverse, several).ranks == {}


def test_solutions_that_take_little_memory_are_cut_only_where_it_saves_operations(monkeypatch):
    """Rank one for one position is less work than whole matrices, for many positions it is more."""
    monkeypatch.setattr("lightning_influence.methods.compressing._SMALLEST", 1)
    monkeypatch.setattr(scoring, "_LEAST_RANK", 1)
    torch.manual_seed(0)
    d, count = 20, 24
    inverse = EigenInverse(None, torch.ones(1, d, d, dtype=torch.float64), 1.0)
    blocks, found = BlockInverse(Layout({"layer": (1, d, d)}), {"layer": inverse}), {}
    for positions in (2, 20):
        line = torch.randn(1, count, 1, d, dtype=torch.float64).expand(-1, -1, positions, -1)
        slopes = torch.randn(1, 1, count, positions, d, dtype=torch.float64)
        queries = {"layer": FactoredGradients(line, slopes)}  # of rank one, whatever the positions
        train = FactoredGradients(*(torch.randn_like(part[..., :9, :, :]) for part in (line, slopes)))
        for held in (0, 2**26):
            scorer = PreconditionedScorer(blocks, queries, tolerance=1e-3, held_bytes=held)
            found[positions, held] = scorer.ranks.get("layer")
            expected = queries["layer"].dense()[0].flatten(1) @ train.dense()[0].flatten(1).T / 2
            torch.testing.assert_close(scorer({"layer": train}), expected)
    assert found == {(2, 0): 1, (2, 2**26): 1, (20, 0): 1, (20, 2**26): None}


@pytest.mark.parametrize("remedy", ["rank", "dense"])
def test_a_poor_low_rank_form_is_found_on_the_first_batch(monkeypatch, remedy):
    p, calls = Problem(torch.float64), []
    true = scoring.factorise

    def poor(inverse, tolerance, max_rank):
        """Ten or a million times less accurate than was asked for."""
        calls.append(tolerance)
        return true(inverse, tolerance * (10 if remedy == "rank" else 1e6), max_rank)

    monkeypatch.setattr(scoring, "factorise", poor)
    scorer = PreconditionedScorer(p.inverse, p.queries, tolerance=1e-3)
    before = dict(scorer.ranks)
    assert error(scorer(p.train), p.exact(p.inverse)) < 2e-3
    assert min(calls) < 1e-3
    if remedy == "rank":
        assert scorer.ranks["wide"] > before["wide"]
    else:
        assert scorer.ranks == {}


@pytest.mark.parametrize("first", [1, 3])
def test_batches_with_another_number_of_positions(first):
    p = Problem(torch.float64)
    scorer = PreconditionedScorer(p.inverse, p.queries, tolerance=1e-3)
    assert scorer.ranks
    for positions in (first, 4 - first):
        train = p.draw(B, positions)
        if positions > 1:
            train = {k: DenseGradients(g.dense()) for k, g in train.items()}
        assert error(scorer(train), p.exact(p.inverse, None, train)) < 2e-3


def test_training_gradients_of_some_layers_only():
    p = Problem(torch.float64)
    part = {"square": p.train["square"]}
    zero = {k: g if k in part else g.scaled(0.0) for k, g in p.train.items()}
    correction = p.correction()
    scorer = PreconditionedScorer(p.inverse, p.queries, correction=correction, tolerance=0)
    assert error(scorer(part), p.exact(p.inverse, correction, zero)) < 1e-12


@pytest.mark.parametrize("solutions", [torch.float32, torch.float64])
def test_dense_scorer_works_in_the_precision_of_the_gradients(solutions):
    p = Problem(torch.float32)
    flat = torch.randn(5, p.layout.numel).to(solutions)
    blocks = p.layout.split(flat)
    scorer = DenseScorer(blocks)
    expected = flat.double() @ p.layout.dense(p.train)[0].double().T
    for _ in range(2):
        got = scorer(p.train)
        assert got.dtype == torch.float32
        assert error(got, expected) < 1e-5
    assert blocks["wide"].dtype == solutions  # the caller's own are left alone


@pytest.mark.parametrize("positions", [1, 3])
def test_dense_scores_taken_in_the_eigenbasis_are_those_taken_outside(monkeypatch, positions):
    p = Problem(torch.float64)
    train = p.train if positions == 1 else p.draw(B, positions)
    monkeypatch.setattr(scoring, "_ROTATE_QUERIES", 1)
    scorer = PreconditionedScorer(p.inverse, p.queries, tolerance=0)
    assert scorer._bases
    assert error(scorer(train), p.exact(p.inverse, None, train)) < 1e-12


@pytest.mark.parametrize("queries", [3, Q])
@pytest.mark.parametrize("corrected", [False, True])
def test_queries_that_are_checked_a_few_at_a_time_are_checked_alike(monkeypatch, queries, corrected):
    problem = Problem(torch.float64)
    problem.queries = {name: layer.select(slice(0, queries)) for name, layer in problem.queries.items()}
    correction = problem.correction().select(slice(0, queries)) if corrected and queries == Q else None
    found = []
    for numbers in (scoring._CHECK_NUMBERS, 5 * 64 * 65):
        monkeypatch.setattr(scoring, "_CHECK_NUMBERS", numbers)
        scorer = PreconditionedScorer(problem.inverse, problem.queries, correction=correction)
        exact = {name: scorer._exact(name, layer) for name, layer in problem.train.items()}
        assert all(len(scores) == min(queries, 16) for scores in exact.values())
        found.append((exact, scorer(problem.train)))
    (first, scores), (parts, again) = found
    torch.testing.assert_close(parts, first)
    torch.testing.assert_close(again, scores)
    total = torch.stack(list(first.values())).sum(0)
    if correction is None:
        torch.testing.assert_close(total, problem.exact(problem.inverse)[:16])
