"""Solved queries cut to a low rank: how far scores move, what they take, and when they are left alone."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.curvature.factors import Eigenbasis
from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.curvature.low_rank_matrices import DenseMatrices
from lightning_influence.methods import compressing, scorers
from lightning_influence.methods.compressing import compress_solved
from lightning_influence.methods.scorers import PreconditionedScorer
from lightning_influence.model.layers.bases import Basis
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients
from lightning_influence.model.layers.plan import Layout

D_OUT, D_IN, POSITIONS = 130, 140, 3


def draw_basis(*widths: int) -> Eigenbasis:
    return Eigenbasis.of_vectors(
        *(torch.linalg.qr(torch.randn(1, d, d, dtype=torch.float64)).Q for d in widths)
    )


def draw_gradients(count: int, energies: list[Tensor], basis: Eigenbasis) -> FactoredGradients:
    """Gradients whose coordinates in the basis have independent entries of given energies."""
    rows, columns = energies
    inputs = torch.randn(1, count, POSITIONS, D_IN, dtype=torch.float64) * columns.sqrt()
    outputs = torch.randn(1, 1, count, POSITIONS, D_OUT, dtype=torch.float64) * rows.sqrt()
    rotated = FactoredGradients(inputs, outputs).rotate(basis.transposed.inputs, basis.transposed.outputs)
    assert isinstance(rotated, FactoredGradients)
    return rotated


@pytest.fixture
def problem():
    torch.manual_seed(0)
    basis = draw_basis(D_IN, D_OUT)
    energies = [torch.logspace(0, -5, width, dtype=torch.float64) for width in (D_OUT, D_IN)]
    inverse = EigenInverse(basis, POSITIONS * energies[0][:, None] * energies[1][None], 1e-3)
    inverse = EigenInverse(basis, inverse.eigenvalues[None], 1e-3)
    return inverse, draw_gradients(12, energies, basis), draw_gradients(60, energies, basis)


@pytest.mark.parametrize("tolerance", [0.03, 0.001])
@pytest.mark.parametrize("dense", [False, True])
def test_scores_move_by_no_more_than_is_tolerated_and_less_memory_is_taken(problem, tolerance, dense):
    inverse, queries, train = problem
    given = DenseGradients(queries.dense()) if dense else queries
    found = compress_solved(inverse, given, tolerance)
    assert found is not None
    exact = inverse.apply(queries.dense()[0]).flatten(1) @ train.dense()[0].flatten(1).T
    error = (found.dot(train)[0].T - exact).norm() / exact.norm()
    assert 0 < error < tolerance
    assert found.nbytes <= exact.element_size() * 12 * D_OUT * D_IN / 2


def test_a_few_at_a_time_give_what_all_give(problem, monkeypatch):
    inverse, queries, train = problem
    whole = compress_solved(inverse, queries, 0.01)
    monkeypatch.setattr(compressing, "_FORMED_BYTES", 5 * inverse.eigenvalues.nbytes)
    parts = compress_solved(inverse, queries, 0.01)
    assert whole is not None
    assert parts is not None
    assert parts.count == whole.count == 12
    exact = inverse.apply(queries.dense()[0]).flatten(1) @ train.dense()[0].flatten(1).T
    for found in (whole, parts):
        assert (found.dot(train)[0].T - exact).norm() < 0.01 * exact.norm()


def test_columns_of_zeros_are_left_out_and_change_nothing():
    torch.manual_seed(7)
    seen = torch.arange(D_IN) % 3 == 1
    inputs = torch.randn(1, 6, POSITIONS, D_IN, dtype=torch.float64) * seen
    queries = FactoredGradients(inputs, torch.randn(1, 1, 6, POSITIONS, D_OUT, dtype=torch.float64))
    count = int(seen.sum())
    part = Basis.of_seen(torch.linalg.qr(torch.randn(1, count, count, dtype=torch.float64)).Q, seen)
    basis = Eigenbasis(part, draw_basis(D_OUT, D_OUT).inputs)
    rows, columns = (torch.logspace(0, -4, width, dtype=torch.float64) for width in (D_OUT, D_IN))
    inverse = EigenInverse(basis, (rows[:, None] * columns)[None], 1e-2)
    exact = inverse.apply(queries.dense()[0])
    for given in (queries, DenseGradients(queries.dense())):
        found = compress_solved(inverse, given, 0.03)
        assert found is not None
        assert not found.dense()[..., ~seen].any()
        # Entries count by what training gradients have there.
        missed, whole = (
            DenseGradients(x[None]).rotate(basis.inputs, basis.outputs).weighted_squares(inverse.eigenvalues)
            for x in (found.dense() - exact, exact)
        )
        assert float(missed.sum()) <= 0.03**2 * 1.1 * float(whole.sum())


def test_layers_without_curvature_or_basis_are_cut_as_plain_matrices():
    torch.manual_seed(0)
    energies = [torch.ones(width, dtype=torch.float64) for width in (D_OUT, D_IN)]
    queries = draw_gradients(4, energies, draw_basis(D_IN, D_OUT))
    inverse = EigenInverse(None, torch.zeros(1, D_OUT, D_IN, dtype=torch.float64), 0.5)
    found = compress_solved(inverse, queries, 1e-6)
    assert found is not None
    assert found.rank == POSITIONS
    torch.testing.assert_close(found.dense(), queries.dense()[0] / 0.5)


def test_what_does_not_get_smaller_is_left_alone(problem, monkeypatch):
    inverse, queries, _ = problem
    noise = DenseGradients(torch.randn(1, 3, 1, D_OUT, D_IN, dtype=torch.float64))
    flat = EigenInverse(None, torch.ones_like(inverse.eigenvalues), 1.0)
    for solver, given, tolerance, most in (
        (inverse, queries, 1e-12, None), (flat, noise, 0.03, None), (inverse, queries, 0.03, 1),
    ):  # fmt: skip
        whole = compress_solved(solver, given, tolerance, most)
        assert isinstance(whole, DenseMatrices)
        torch.testing.assert_close(whole.matrices, solver.apply(given.dense()[0]))
    monkeypatch.setattr(compressing, "_FORMED_BYTES", inverse.eigenvalues.nbytes)
    assert compress_solved(inverse, queries, 1e-12) is None
    assert compress_solved(flat, noise, 0.03) is None
    few = FactoredGradients(torch.ones(1, 2, 3, 4).double(), torch.ones(1, 1, 2, 3, 5).double())
    assert compress_solved(EigenInverse(None, torch.ones(1, 5, 4).double(), 1.0), few, 0.03) is None


@pytest.mark.parametrize("misled", [False, True])
def test_the_scorer_refines_a_layer_until_its_scores_are_right(problem, misled, monkeypatch):
    """Where the first cut is far too coarse, the first batch tells."""
    inverse, queries, train = problem
    monkeypatch.setattr(scorers, "_COMPRESSED", 30 if misled else 3)
    blocks = BlockInverse(Layout({"layer": (1, D_OUT, D_IN)}), {"layer": inverse})
    scorer = PreconditionedScorer(blocks, {"layer": queries}, tolerance=0.01)
    first = scorer.ranks["layer"]
    assert scorer.nbytes == queries.nbytes + 8 * 12 * first * (D_OUT + D_IN)
    exact = inverse.apply(queries.dense()[0]).flatten(1) @ train.dense()[0].flatten(1).T
    assert (scorer({"layer": train}) - exact).norm() < 0.015 * exact.norm()
    assert not misled or scorer.ranks["layer"] > first
    assert scorer.nbytes == 8 * 12 * scorer.ranks["layer"] * (D_OUT + D_IN)  # gradients were let go


class Wide(LightningModule):
    """A convolution that holds nearly all parameters, with several positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.head = nn.Linear(64 * 4, 3)

    def training_step(self, batch, batch_idx):
        hidden = torch.tanh(self.second(torch.tanh(self.first(batch[0]))))
        return F.cross_entropy(self.head(hidden.flatten(1)), batch[1])


def test_more_queries_fit_into_the_budget_once_it_is_known_what_they_take():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 1, 6, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    train, queries = (DataLoader(TensorDataset(x[part], y[part]), 8) for part in (slice(24), slice(24, None)))
    module = InfluenceModule(Wide())
    numel = sum(p.numel() for p in module.model.parameters())
    # As many whole solutions as two queries have would fit, beside their being solved.
    options = {"method": "ekfac", "damping": 1e-3, "memory_budget": 2 * 2 * 4 * numel}
    exact = module.scores(train, queries, low_rank_tolerance=0.0, **options)
    found = module.scores(train, queries, **options)

    def count(answer, name):
        return sum(one["name"] == f"Influence: {name}" for one in answer.diagnostics.passes)

    assert count(exact, "scores") == 8 > count(found, "scores")
    assert found.query_indices.tolist() == exact.query_indices.tolist()
    assert 0 < (found.scores - exact.scores).norm() < 0.03 * exact.scores.norm()
    assert found.diagnostics.extra["low_rank"]["second"] < 32


@pytest.mark.parametrize("tolerance", [0.0, 0.03])
def test_plain_products_of_gradients_stay_accurate(tolerance):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 1, 6, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    module, loader = Wide(), DataLoader(TensorDataset(x, y), 4)
    found = InfluenceModule(module).scores(loader, loader, method="identity", low_rank_tolerance=tolerance)
    rows = []
    for index in range(12):
        loss = module.training_step((x[index : index + 1], y[index : index + 1]), 0)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    exact = torch.stack(rows) @ torch.stack(rows).T / 12
    assert (found.scores - exact).norm() < 2e-4 * exact.norm()
    assert ("low_rank" in found.diagnostics.extra) == (tolerance > 0)
