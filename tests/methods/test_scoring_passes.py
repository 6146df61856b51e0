import oracle
import pytest
import torch
from drive import TIGHT, Setup, closed_form, run
from models import CASES

from lightning_influence.curvature.factor_passes import CovariancePass
from lightning_influence.methods.gathering import GradientPass
from lightning_influence.methods.scorers import DenseScorer, PreconditionedScorer
from lightning_influence.methods.scoring_passes import (
    Columns,
    ScorePass,
    SelfInfluencePass,
    refuse_non_finite,
)
from lightning_influence.model.layers import recorder
from lightning_influence.support.errors import NonFiniteError

SOME = [
    "mlp_softplus_weighted_smoothing",
    "mlp_bce",
    "mlp_mse",
    "tokens_weighted",
    "conv2d_replicate_depthwise",
]


class Everything:
    """A sink that lists what it is given."""

    def __init__(self) -> None:
        self.scores, self.indices = [], []

    def update(self, scores, indices) -> None:
        assert scores.shape[1] == len(indices) <= 3
        self.scores.append(scores)
        self.indices += indices.tolist()


def scores(setup: Setup, scorer, batch_size: int = 5) -> torch.Tensor:
    """In the unit of an attribution: queries and training gradients divided by wbar, and by N."""
    sink = Everything()
    pass_ = setup.run(ScorePass(setup.plan, scorer, sink, most_examples=3), batch_size)
    assert pass_.losses.mean_weight == pytest.approx(setup.wbar, rel=1e-12)
    assert sink.indices == list(range(12))
    return torch.cat(sink.scores, dim=1) / (pass_.losses.mean_weight**2 * pass_.losses.examples)


def blocks(setup: Setup, factors, kind: str) -> torch.Tensor:
    """The oracle's factors of all layers as one matrix, in the package's bases, as they are not unique."""
    bases = {
        name.removeprefix("model."): (layer.basis.q_in, layer.basis.q_out)
        for name, layer in factors.layers.items()
    }
    layers = oracle.layer_factors(*setup.problem, bases=bases)
    return oracle.block_diagonal([getattr(layer, kind)() for layer in layers.values()])


@pytest.fixture
def short_runs(monkeypatch):
    """Gradients of convolutions come in runs of two examples."""
    monkeypatch.setattr(recorder, "_PART_BYTES", 1)
    monkeypatch.setattr(recorder, "_PART_EXAMPLES", 2)


@pytest.mark.grid
@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_factored_scores(name, kind):
    setup = Setup.of(name)
    factors = setup.run(CovariancePass(setup.plan, fisher="exact")).factors
    queries = setup.run(GradientPass(setup.plan), 2, queries=True).gradients
    damping = {layer: 0.01 * (k + 1) for k, layer in enumerate(factors.layers)}
    inverse = closed_form(factors, setup.layout, damping, kind)
    got = scores(setup, PreconditionedScorer(inverse, queries, tolerance=0))
    H = blocks(setup, factors, kind)
    diagonal = setup.layout.expand(damping, H)
    expected = oracle.influence(H, diagonal, setup.gradients(queries=True), setup.gradients())
    torch.testing.assert_close(got, expected, **TIGHT)
    vectors = torch.randn(3, len(H), dtype=torch.float64)
    solved = torch.linalg.solve(H + torch.diag(diagonal), vectors.T).T
    torch.testing.assert_close(inverse.apply(vectors), solved, rtol=1e-9, atol=1e-9)


@pytest.mark.grid
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", SOME)
def test_exact_scores(name, batch_size, reduction):
    setup = Setup.of(name, reduction)
    queries = setup.run(GradientPass(setup.plan), 2, queries=True).gradients
    H = setup.ggn()
    damped = H + 0.02 * torch.eye(len(H)).double()
    solved = torch.linalg.solve(damped, setup.layout.dense(queries)[0].T).T
    got = scores(setup, DenseScorer(setup.layout.split(solved)), batch_size)
    expected = oracle.influence(H, 0.02, setup.gradients(queries=True), setup.gradients())
    torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.grid
@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("name", sorted(CASES))
def test_self_influence_is_the_diagonal_of_the_scores(name, batch_size):
    setup = Setup.of(name)
    factors = setup.run(CovariancePass(setup.plan)).factors
    inverse = closed_form(factors, setup.layout, 0.01)
    everyone = setup.run(GradientPass(setup.plan)).gradients
    matrix = scores(setup, PreconditionedScorer(inverse, everyone, tolerance=0))
    pass_ = setup.run(SelfInfluencePass(setup.plan, lambda g: inverse.quadratic(g)[0]), batch_size)
    found = pass_.gather(lambda own: own, torch.float64)
    got = found.values / (pass_.losses.mean_weight**2 * pass_.losses.examples)
    torch.testing.assert_close(got, matrix.diagonal(), **TIGHT)
    assert found.indices.tolist() == list(range(12))
    assert found.residuals is None


def test_columns_go_to_the_places_of_their_dataset_indices():
    answer = torch.zeros(3, 3)
    sink = Columns(answer[1:], torch.tensor([2, 3, 5]))
    sink.update(torch.tensor([[5.0, 2.0], [50.0, 20.0]]), torch.tensor([5, 2]))
    sink.update(torch.tensor([[3.0], [30.0]]), torch.tensor([3]))
    assert answer.tolist() == [[0, 0, 0], [2, 3, 5], [20, 30, 50]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused_with_their_examples(value):
    scores = torch.zeros(3, 4)
    refuse_non_finite(scores, torch.arange(4))
    scores[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"Scores of 1 training examples.*\(dataset indices \[12\]\)"):
        refuse_non_finite(scores, torch.arange(10, 14))
    with pytest.raises(NonFiniteError, match=r"Scores of 1 training examples.*\(dataset indices \[12\]\)"):
        refuse_non_finite(scores[1], torch.arange(10, 14))


def test_an_example_that_is_not_finite_reaches_no_sink():
    setup = Setup.of("mlp_gelu")
    sink, case = Everything(), setup.case
    zero = {name: torch.zeros(1, *shape, dtype=torch.float64) for name, shape in setup.layout.shapes.items()}
    x = case.x.clone()
    x[8, 1] = float("inf")
    with pytest.raises(NonFiniteError):
        run(
            ScorePass(setup.plan, DenseScorer(zero), sink, most_examples=3),
            setup.module,
            [(x[:6], case.y[:6]), (x[6:], case.y[6:])],
        )
    assert sink.indices == list(range(6))
