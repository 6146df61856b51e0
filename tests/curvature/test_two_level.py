from types import SimpleNamespace

import oracle
import pytest
import torch
from drive import TIGHT, Setup, closed_form
from models import CASES

from lightning_influence.curvature.coarse_space import (
    CoarseSpace,
    build_directions,
    draw_probes,
    extend_space,
    join_scored,
    precondition,
)
from lightning_influence.curvature.factor_passes import CovariancePass
from lightning_influence.curvature.gauss_newton import CurvatureProductPass
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.two_level import TwoLevel, rescale_inverse, square_norms
from lightning_influence.methods.gathering import GradientPass
from lightning_influence.methods.scorers import PreconditionedScorer
from lightning_influence.methods.scoring_passes import ScorePass, SelfInfluencePass
from lightning_influence.model.layers.gradients import DenseGradients

SOME = [
    "mlp_gelu",
    "mlp_softplus_weighted_smoothing",
    "tokens_weighted",
    "conv2d_replicate_depthwise",
    "shared_linear",
]
DAMPING = 0.02


class Problem:
    """Everything a two-level answer is made of, for one case."""

    def __init__(self, name: str, anchors: int | None = 8, count: int = 64, damping: float = DAMPING) -> None:
        self.setup = setup = Setup.of(name)
        self.factors = setup.run(CovariancePass(setup.plan, seed=1)).factors
        self.inverse = closed_form(self.factors, setup.layout, damping)
        everyone = setup.run(GradientPass(setup.plan)).gradients
        self.train = {k: g.scaled(1 / setup.wbar) for k, g in everyone.items()}
        queries = setup.run(GradientPass(setup.plan), queries=True).gradients
        self.queries = {k: g.scaled(1 / setup.wbar) for k, g in queries.items()}
        if anchors is None:  # any gradients will do: as many as there are parameters
            vectors = torch.randn(setup.layout.numel, setup.layout.numel, dtype=torch.float64)
            self.anchors = {k: DenseGradients(v[None]) for k, v in setup.layout.split(vectors).items()}
        else:
            self.anchors = {k: g.select(slice(0, anchors)) for k, g in self.train.items()}
        self.space = self.build(count)

    def build(self, count: int) -> CoarseSpace:
        layout = self.setup.layout
        Q, mixing = build_directions(layout, self.inverse, self.anchors)
        W = draw_probes(count, layout.numel, Q)
        pass_ = self.setup.run(CurvatureProductPass(self.setup.plan, torch.cat([Q, W])))
        GQ, GW = pass_.result().split([len(Q), count])
        return CoarseSpace(layout, Q, GQ, GW, mixing, self.anchors, self.inverse, pass_.count.examples)

    def matrix(self, damping) -> torch.Tensor:
        G = self.setup.ggn()
        values = damping if isinstance(damping, dict) else dict.fromkeys(self.setup.layout.shapes, damping)
        return G + torch.diag(self.setup.layout.expand(values, G))

    def scores(self, scorer) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        sink = SimpleNamespace(update=lambda scores, indices: seen.append(scores))
        pass_ = self.setup.run(ScorePass(self.setup.plan, scorer, sink))
        return torch.cat(seen, dim=1) / (pass_.losses.mean_weight * pass_.losses.examples)


def definition(problem: Problem, inverse: BlockInverse, damping, vectors: torch.Tensor) -> torch.Tensor:
    """x = z + Q T^{-1} (Q^T v - (A Q)^T z) with dense matrices."""
    A, Q, z = problem.matrix(damping), problem.space.directions, inverse.apply(vectors)
    T = Q @ A @ Q.T
    return z + torch.linalg.solve(T, Q @ vectors.T - Q @ A @ z.T).T @ Q


@pytest.mark.parametrize("name", SOME)
def test_directions_are_orthonormal_mixtures_of_the_preconditioned_anchors(name):
    p = Problem(name)
    Q = p.space.directions
    torch.testing.assert_close(Q @ Q.T, torch.eye(p.space.size).double(), **TIGHT)
    preconditioned = p.inverse.apply(p.setup.layout.dense(p.anchors)[0])
    torch.testing.assert_close(p.space.mixing @ preconditioned, Q, rtol=1e-7, atol=1e-9)
    residual = preconditioned - preconditioned @ Q.T @ Q
    assert residual.norm() < 1e-7 * preconditioned.norm()  # the same span


def test_dependent_and_zero_anchors_are_left_out():
    p = Problem("mlp_gelu")
    flat = p.setup.layout.dense(p.train)[0][:3]
    flat = torch.cat([flat, flat[:1] * 5, flat[1:2] - flat[2:3], torch.zeros_like(flat[:1])])
    anchors = {k: DenseGradients(v[None]) for k, v in p.setup.layout.split(flat).items()}
    Q, mixing = build_directions(p.setup.layout, p.inverse, anchors)
    assert Q.shape[0] == 3
    assert mixing.shape == (3, 6)
    torch.testing.assert_close(Q @ Q.T, torch.eye(3).double(), **TIGHT)
    none, _ = build_directions(p.setup.layout, p.inverse, {k: g.scaled(0.0) for k, g in anchors.items()})
    assert len(none) == 0


@pytest.mark.parametrize("name", SOME)
def test_solution_is_its_definition(name):
    p = Problem(name)
    vectors = torch.randn(4, p.setup.layout.numel, dtype=torch.float64)
    expected = definition(p, p.inverse, DAMPING, vectors)
    torch.testing.assert_close(TwoLevel(p.inverse, p.space).solve(vectors), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.grid
@pytest.mark.parametrize("damping", [0.3, 1e-3, {}])
@pytest.mark.parametrize("name", SOME)
def test_another_damping_than_the_space_was_built_with(name, damping):
    p = Problem(name)
    if damping == {}:
        damping = {layer: 0.01 * (k + 1) for k, layer in enumerate(p.setup.layout.shapes)}
    inverse = closed_form(p.factors, p.setup.layout, damping)
    two = TwoLevel(inverse, p.space)
    V = p.setup.layout.dense(p.queries)[0]
    solved = two.solve(V)
    torch.testing.assert_close(solved, definition(p, inverse, damping, V), rtol=1e-7, atol=1e-7)
    correction, _ = two.correction(p.queries)
    got = p.scores(PreconditionedScorer(inverse, p.queries, correction=correction, tolerance=0))
    expected = solved @ p.setup.gradients().T / 12
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", SOME)
def test_it_is_exact_when_the_space_is_everything(name):
    p = Problem(name, anchors=None)
    assert p.space.size == p.setup.layout.numel
    two = TwoLevel(p.inverse, p.space)
    V = p.setup.layout.dense(p.queries)[0]
    A = p.matrix(DAMPING)
    torch.testing.assert_close(two.solve(V), torch.linalg.solve(A, V.T).T, rtol=1e-7, atol=1e-7)
    correction, residual = two.correction(p.queries)
    assert residual.max() < 1e-6
    got = p.scores(PreconditionedScorer(p.inverse, p.queries, correction=correction, tolerance=0))
    model_gradients = p.setup.gradients(queries=True), p.setup.gradients()
    torch.testing.assert_close(
        got, oracle.influence(p.setup.ggn(), DAMPING, *model_gradients), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", SOME)
def test_what_is_left_is_orthogonal_to_the_space(name):
    p = Problem(name)
    V = p.setup.layout.dense(p.queries)[0]
    remainder = V - TwoLevel(p.inverse, p.space).solve(V) @ p.matrix(DAMPING)
    assert (remainder @ p.space.directions.T).norm() < 1e-9 * V.norm()


@pytest.mark.parametrize("name", sorted(n for n in CASES if CASES[n].num_parameters < 120))
def test_more_anchors_bring_the_scores_closer(name):
    p = Problem(name, anchors=12)
    V = p.setup.layout.dense(p.queries)[0]
    A = p.matrix(DAMPING)
    exact = torch.linalg.solve(A, V.T).T

    def error(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("qp,pr,qr->q", x - exact, A, x - exact).sum()

    closed, corrected = error(p.inverse.apply(V)), error(TwoLevel(p.inverse, p.space).solve(V))
    assert corrected <= closed * (1 + 1e-9)  # Galerkin: no point of z + span(Q) is closer in the norm of A


@pytest.mark.parametrize("name", SOME)
def test_one_query_alone_has_the_scores_it_has_among_others(name):
    p = Problem(name)
    two = TwoLevel(p.inverse, p.space)
    correction, residual = two.correction(p.queries)
    together = p.scores(PreconditionedScorer(p.inverse, p.queries, correction=correction, tolerance=0))
    for q in range(len(together)):
        one = {k: g.select(slice(q, q + 1)) for k, g in p.queries.items()}
        correction, alone = two.correction(one)
        scores = p.scores(PreconditionedScorer(p.inverse, one, correction=correction, tolerance=0))
        torch.testing.assert_close(scores[0], together[q], **TIGHT)
        torch.testing.assert_close(alone[0], residual[q], **TIGHT)


def test_residuals_are_estimated_without_bias():
    p = Problem("mlp_gelu", count=4000)
    two = TwoLevel(p.inverse, p.space)
    V = p.setup.layout.dense(p.queries)[0]
    remainder = V - two.solve(V) @ p.matrix(DAMPING)
    true = remainder.norm(dim=1) / V.norm(dim=1)
    assert true.min() > 1e-3
    _, estimate = two.correction(p.queries)
    # The relative error is about 1 / sqrt(2 s): 1.1% for 4000 probes, and four times that here.
    torch.testing.assert_close(estimate, true, rtol=0.045, atol=0)
    _, few = TwoLevel(p.inverse, p.build(16)).correction(p.queries)
    torch.testing.assert_close(few, true, rtol=0.7, atol=0)  # four times 18%


def test_a_query_without_a_gradient_is_solved_by_zero():
    p = Problem("mlp_gelu")
    zero = {k: g.scaled(0.0) for k, g in p.queries.items()}
    correction, residual = TwoLevel(p.inverse, p.space).correction(zero)
    assert not correction.coefficients.any()
    assert residual.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", SOME)
def test_self_influence_is_the_diagonal_of_the_scores(name):
    p = Problem(name)
    two = TwoLevel(p.inverse, p.space)
    correction, _ = two.correction(p.train)
    matrix = p.scores(PreconditionedScorer(p.inverse, p.train, correction=correction, tolerance=0))
    pass_ = p.setup.run(SelfInfluencePass(p.setup.plan, lambda g: two.quadratic(g)[0]))
    values = pass_.gather(lambda own: own, torch.float64).values
    got = values / (pass_.losses.mean_weight**2 * pass_.losses.examples)
    torch.testing.assert_close(got, matrix.diagonal(), rtol=1e-8, atol=1e-10)


def test_layers_that_queries_or_anchors_lack_are_still_corrected():
    p = Problem("mlp_gelu")
    first, *_, last = p.setup.layout.shapes
    two = TwoLevel(p.inverse, p.space)
    queries = {k: g for k, g in p.queries.items() if k != first}
    V = p.setup.layout.dense({**queries, first: p.queries[first].scaled(0.0)})[0]
    correction, _ = two.correction(queries)
    assert correction.coefficients.abs().max() > 0
    expected = two.solve(V) @ p.setup.gradients().T / 12
    for tolerance in (0.0, 1e-6):
        got = p.scores(PreconditionedScorer(p.inverse, queries, correction=correction, tolerance=tolerance))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    p.anchors = {k: g for k, g in p.anchors.items() if k != last}
    two = TwoLevel(p.inverse, p.build(8))
    assert not p.setup.layout.split(two.space.directions)[last].any()
    correction, _ = two.correction(p.queries)
    expected = two.solve(p.setup.layout.dense(p.queries)[0]) @ p.setup.gradients().T / 12
    for tolerance in (0.0, 1e-6):
        got = p.scores(PreconditionedScorer(p.inverse, p.queries, correction=correction, tolerance=tolerance))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_probes_are_signs_and_always_the_same():
    like = torch.zeros(1, dtype=torch.float32)
    W = draw_probes(50, 200, like)
    assert torch.equal(W, draw_probes(50, 200, like.double()).float())
    assert W.dtype == torch.float32
    assert W.abs().eq(1).all()
    assert abs(float(W.mean())) < 0.05  # 10000 signs: five standard errors
    gram = W @ W.T / 200
    assert (gram - torch.eye(50)).abs().max() < 0.5


def test_squared_norms_and_memory():
    p = Problem("tokens_weighted")
    expected = p.setup.layout.dense(p.train)[0].square().sum(1)
    torch.testing.assert_close(square_norms(p.train), expected, **TIGHT)
    rows = p.space.size * 2 + 64
    anchors = sum(g.nbytes for g in p.anchors.values())
    assert p.space.nbytes == 8 * rows * p.setup.layout.numel + anchors


@pytest.mark.parametrize("name", SOME)
def test_the_preconditioner_is_symmetric_positive_definite_and_exact_on_the_coarse_space(name):
    p = Problem(name)
    operator = TwoLevel(p.inverse, p.space)
    identity = torch.eye(p.setup.layout.numel, dtype=torch.float64)
    B = operator.precondition(identity)
    torch.testing.assert_close(B, B.T, rtol=1e-7, atol=1e-9)
    assert float(torch.linalg.eigvalsh((B + B.T) / 2)[0]) > 0
    A, Q = p.matrix(DAMPING), p.space.directions
    torch.testing.assert_close(operator.precondition(Q @ A), Q, rtol=1e-7, atol=1e-9)
    # The definition: (I - E A) P^{-1} (I - A E) + E with E = Q T^{-1} Q^T.
    E = Q.T @ torch.linalg.solve(Q @ A @ Q.T, Q)
    inverse = p.inverse.apply(identity)
    expected = (identity - E @ A) @ inverse @ (identity - A @ E) + E
    torch.testing.assert_close(B, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.grid
@pytest.mark.parametrize("damping", [DAMPING, 0.3, 1e-3])
@pytest.mark.parametrize("name", SOME)
def test_the_rescaled_preconditioner_takes_the_best_step_on_the_anchors(name, damping):
    p = Problem(name)
    inverse = closed_form(p.factors, p.setup.layout, damping)
    A = p.matrix(damping)
    Z = p.inverse.apply(p.setup.layout.dense(p.anchors)[0])
    V = torch.linalg.solve(inverse.apply(torch.eye(len(A)).double()), Z.T).T  # P z
    error = lambda step: step * Z - torch.linalg.solve(A, V.T).T  # noqa: E731
    scaled = rescale_inverse(inverse, p.space)
    step = float((scaled.apply(Z) * Z).sum() / (inverse.apply(Z) * Z).sum())
    errors = [float((error(t) @ A * error(t)).sum()) for t in (step, 0.999 * step, 1.001 * step)]
    assert errors[0] < min(errors[1:])
    assert scaled.damping == inverse.damping
    # It goes through to the answers: the definition with the scaled preconditioner.
    queries = p.setup.layout.dense(p.queries)[0]
    two = TwoLevel(scaled, p.space)
    solved = two.solve(queries)
    torch.testing.assert_close(solved, definition(p, scaled, damping, queries), rtol=1e-7, atol=1e-7)
    correction, _ = two.correction(p.queries)
    got = p.scores(PreconditionedScorer(scaled, p.queries, correction=correction, tolerance=0))
    torch.testing.assert_close(got, solved @ p.setup.gradients().T / 12, rtol=1e-8, atol=1e-9)


def test_anchors_of_zero_leave_the_preconditioner_as_it_is():
    p = Problem("mlp_gelu")
    p.anchors = {k: g.scaled(0.0) for k, g in p.anchors.items()}
    assert rescale_inverse(p.inverse, p.build(8)) is p.inverse


@pytest.mark.parametrize("name", SOME)
def test_a_space_grows_to_what_all_anchors_span(name):
    p = Problem(name, anchors=5)
    more = {k: g.select(slice(5, 9)) for k, g in p.train.items()}
    vectors = precondition(p.setup.layout, p.inverse, more)
    G = p.setup.ggn()
    grown = extend_space(p.space, vectors, join_scored([more]), lambda fresh: fresh @ G)
    whole = Problem(name, anchors=9).space
    Q = grown.directions
    torch.testing.assert_close(Q @ Q.T, torch.eye(grown.size).double(), **TIGHT)
    torch.testing.assert_close(Q.T @ Q, whole.directions.T @ whole.directions, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grown.product, Q @ G, **TIGHT)
    nine = {k: g.select(slice(0, 9)) for k, g in p.train.items()}
    mixed = grown.mixing @ precondition(p.setup.layout, p.inverse, nine)
    torch.testing.assert_close(mixed, Q, rtol=1e-6, atol=1e-8)


def test_only_factored_gradients_of_anchors_are_kept():
    p = Problem("mlp_gelu")
    first, *_, last = p.train
    halves = [{k: g.select(part) for k, g in p.train.items()} for part in (slice(0, 6), slice(6, 12))]
    joined = join_scored(halves)
    torch.testing.assert_close(joined[first].dense(), p.train[first].dense(), **TIGHT)
    halves[1][first] = DenseGradients(halves[1][first].dense())
    del halves[0][last]
    kept = join_scored(halves)
    assert kept[first].num_examples == kept[last].num_examples == 0
    assert kept[first].dense().shape[2:] == p.train[first].dense().shape[2:]
    # The dense route is taken for such layers, and the scores stay what they are.
    space = p.build(8)
    bare = CoarseSpace(
        space.layout, space.directions, space.product, space.probe_product, space.mixing, kept,
        space.inverse, space.examples,
    )  # fmt: skip
    expected = (
        TwoLevel(p.inverse, space).solve(p.setup.layout.dense(p.queries)[0]) @ p.setup.gradients().T / 12
    )
    correction, _ = TwoLevel(p.inverse, bare).correction(p.queries)
    for tolerance in (0.0, 1e-6):
        got = p.scores(PreconditionedScorer(p.inverse, p.queries, correction=correction, tolerance=tolerance))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
