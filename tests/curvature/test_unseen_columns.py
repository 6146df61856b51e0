"""Columns that training never showed leave bases and products, and answers are as with them.

Queries have values in these columns: what is asked of them there is what the whole basis gives.
"""

import copy
from dataclasses import replace

import oracle
import pytest
import torch
from drive import TIGHT, Setup, closed_form, mute
from models import CASES, lightning_module, loader

from lightning_influence import InfluenceModule
from lightning_influence.collecting.checks import _check_factors
from lightning_influence.curvature import eigenbases
from lightning_influence.curvature import factors as factors_module
from lightning_influence.curvature.eigenbases import compute_eigenbasis
from lightning_influence.curvature.factor_passes import CovariancePass, SquaresPass
from lightning_influence.curvature.factors import Eigenbasis, Factors, LayerStatistics
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.methods.gathering import GradientPass
from lightning_influence.methods.scorers import PreconditionedScorer
from lightning_influence.methods.weighted_squares import PreconditionedSquares
from lightning_influence.model.layers.gradients import FactoredGradients
from lightning_influence.model.layers.plan import Layout, find_layers
from lightning_influence.support.errors import CorruptFileError, NonFiniteError

# Weighted losses with one position an example, weighted tokens, and convolutions.
NAMES = ["mlp_softplus_weighted_smoothing", "tokens_weighted", "conv2d"]
METHODS = ["ekfac", "kfac"]


def shorten(monkeypatch):
    monkeypatch.setattr(eigenbases, "LARGE", 3)
    monkeypatch.setattr(factors_module, "_BLOCKED", 3)
    monkeypatch.setattr(factors_module, "_BLOCKS", 3)


@pytest.fixture
def short(monkeypatch):
    """Layers as narrow as the zoo's are taken for wide ones."""
    shorten(monkeypatch)


def hide(case):
    """The case with features, or channels, that no training example has, and all queries have."""
    dim = 1 if case.x.ndim == 4 else -1
    x = case.x.clone()
    x.narrow(dim, 0, max(1, x.shape[dim] // 2)).zero_()
    return replace(case, x=x)


def set_up(name):
    case = hide(CASES[name])
    module = mute(lightning_module(case))
    plan = find_layers(module)
    return Setup(case, module, plan, Layout.of(plan.layers))


def hidden_layers(factors):
    """The layers whose bases leave columns out."""
    sides = {name: layer.basis.inputs.seen for name, layer in factors.layers.items()}
    found = [name for name, seen in sides.items() if seen is not None and not seen.all()]
    assert found
    return found


def fit(setup):
    return setup.run(CovariancePass(setup.plan, fisher="exact")).factors


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", NAMES)
def test_factors_are_those_of_the_definition(name):
    setup = set_up(name)
    factors = fit(setup)
    hidden_layers(factors)
    bases = {n.removeprefix("model."): (b.basis.q_in, b.basis.q_out) for n, b in factors.layers.items()}
    expected = oracle.layer_factors(*setup.problem, curvature="exact", bases=bases)
    for layer, want in expected.items():
        got = factors.layers[f"model.{layer}"]
        torch.testing.assert_close(got.covariance_in(), want.A, **TIGHT)
        torch.testing.assert_close(got.second_moment() / factors.mean_weight, want.Lambda, **TIGHT)
        q = got.basis.q_in
        torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[-1]).expand_as(q).to(q), **TIGHT)
        rotated = q.mT @ want.A @ q
        diagonal = rotated.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(rotated, torch.diag_embed(diagonal), **TIGHT)
        torch.testing.assert_close(got.basis.inputs.energies(want.A), diagonal, **TIGHT)


@pytest.mark.grid
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_a_dense_inverse(name, kind):
    setup = set_up(name)
    factors = fit(setup)
    hidden_layers(factors)
    inverse = closed_form(factors, setup.layout, 0.1, kind)
    bases = {n.removeprefix("model."): (b.basis.q_in, b.basis.q_out) for n, b in factors.layers.items()}
    layers = oracle.layer_factors(*setup.problem, bases=bases)
    H = oracle.block_diagonal([getattr(layer, kind)() for layer in layers.values()])
    damped = H + 0.1 * torch.eye(len(H), dtype=torch.float64)
    queries = setup.gradients(queries=True)
    # Queries have gradients where training has none, which only the damping divides.
    assert (queries[:, setup.gradients().abs().amax(0) == 0].abs().amax(1) > 1e-3).all()
    solved = torch.linalg.solve(damped, queries.T).T
    torch.testing.assert_close(inverse.apply(queries), solved, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse.multiply(queries), queries @ H, rtol=1e-9, atol=1e-9)
    gathered = setup.run(GradientPass(setup.plan), 2, queries=True).gradients
    norms = (queries * solved).sum(1) * setup.wbar**2
    torch.testing.assert_close(inverse.quadratic(gathered)[0], norms, rtol=1e-9, atol=1e-9)
    squares = PreconditionedSquares(inverse, tolerance=0)(gathered)[0]
    torch.testing.assert_close(squares, norms, rtol=1e-9, atol=1e-9)
    scorer = PreconditionedScorer(inverse, dict(gathered), tolerance=0)
    torch.testing.assert_close(scorer(gathered), solved @ queries.T * setup.wbar**2, rtol=1e-9, atol=1e-9)


def silence(case, count):
    """The case with nothing in its first examples: no column of theirs is ever seen."""
    x = case.x.clone()
    x[:count].zero_()
    return replace(case, x=x)


HIDDEN = {
    "columns": hide,
    "a batch": lambda case: silence(case, 5),
    "all": lambda case: silence(case, len(case.x)),
}


@pytest.mark.grid
@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_the_same_without_the_shortcut(name, kind, monkeypatch):
    case = HIDDEN[kind](CASES[name])

    def ask(method):
        module = InfluenceModule(lightning_module(case).double())
        options = {"method": method, "damping": 0.05, "low_rank_tolerance": 0.0, "fisher": "exact"}
        options |= {"tolerance": 1e-10, "max_steps": 60} if method == "auto" else {}
        train = loader(case, 5)
        found = module.scores(train, loader(case, 2, queries=True), **options)
        factors = module.state.factors
        return found.scores, module.self_influence(train, **options).scores, factors

    for method in ("ekfac", "kfac", "auto"):
        plain = ask(method)
        with monkeypatch.context() as patch:
            shorten(patch)
            short = ask(method)
        assert kind == "a batch" or hidden_layers(short[2])
        for one, other in zip(plain[:2], short[:2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", NAMES)
def test_squares_of_other_data_count_in_columns_never_seen(name):
    setup = set_up(name)
    factors = fit(setup)
    hidden = hidden_layers(factors)
    bare = {key: replace(layer, squares=None) for key, layer in factors.layers.items()}
    whole = {
        key: replace(layer, basis=Eigenbasis.of_vectors(layer.basis.q_in, layer.basis.q_out))
        for key, layer in bare.items()
    }
    moments = []
    for layers in (bare, whole):
        # As where the data is augmented, or where weights have moved since the basis was found.
        one_pass = SquaresPass(setup.plan, replace(factors, layers=dict(layers), fisher="exact"))
        setup.run(one_pass, queries=True)
        moments.append({key: layer.second_moment() for key, layer in one_pass.factors.layers.items()})
    bases = {n.removeprefix("model."): (b.basis.q_in, b.basis.q_out) for n, b in factors.layers.items()}
    model, loss, _, _, layers = setup.problem
    case = setup.case
    expected = oracle.layer_factors(model, loss, case.query_x, case.query_y, layers, bases=bases)
    scale = case.loss.normaliser(case.query_y)
    for key, moment in moments[0].items():
        torch.testing.assert_close(moment, moments[1][key], **TIGHT)
        torch.testing.assert_close(moment / scale, expected[key.removeprefix("model.")].Lambda, **TIGHT)
    for key in hidden:
        assert float(moments[0][key][:, :, ~factors.layers[key].basis.inputs.seen].amax()) > 1e-6


@pytest.mark.usefixtures("short")
def test_sums_of_several_data_sets_are_those_of_all_their_columns():
    """Batches that each show few columns, then factors that go on with others."""
    torch.manual_seed(0)
    data = torch.randn(2, 6, 9, dtype=torch.float64)
    data[0, :, 3:] = 0
    data[1, :, :5] = 0
    outputs = torch.randn(1, 1, 6, 1, 3, dtype=torch.float64)
    sums = LayerStatistics.zeros((1, 3, 9), dtype=torch.float64)
    seen = []
    for part in data:
        sums.add_covariances(FactoredGradients(part[None, :, None], outputs))
        seen.append(compute_eigenbasis("layer", sums).inputs.seen.tolist())
    assert seen == [[True] * 3 + [False] * 6, [True] * 3 + [False] * 2 + [True] * 4]
    rows = data.flatten(0, 1)
    torch.testing.assert_close(sums.covariance_in()[0], rows.T @ rows / 12, **TIGHT)
    torch.testing.assert_close(
        sums.covariance_out()[0], outputs[0, 0, :, 0].T @ outputs[0, 0, :, 0] / 6, **TIGHT
    )
    picked = torch.tensor(seen[0])
    torch.testing.assert_close(sums.covariance_in(picked)[0], rows[:, :3].T @ rows[:, :3] / 12, **TIGHT)


@pytest.mark.usefixtures("short")
def test_columns_that_are_not_finite_are_seen():
    sums = LayerStatistics.zeros((1, 3, 9), dtype=torch.float64)
    inputs = torch.zeros(1, 2, 1, 9, dtype=torch.float64)
    inputs[0, 0, 0, 1] = float("nan")
    sums.add_covariances(FactoredGradients(inputs, torch.ones(1, 1, 2, 1, 3, dtype=torch.float64)))
    with pytest.raises(NonFiniteError, match="input covariance of layer 'layer' is not finite"):
        compute_eigenbasis("layer", sums)


@pytest.mark.usefixtures("short")
def test_what_is_stored_is_what_is_read():
    setup = set_up(NAMES[0])
    factors = fit(setup)
    inverse = closed_form(factors, setup.layout, 0.1)
    vectors = torch.randn(3, setup.layout.numel, dtype=torch.float64)
    again = Factors.from_state_dict(factors.state_dict())
    torch.testing.assert_close(
        closed_form(again, setup.layout, 0.1).apply(vectors), inverse.apply(vectors), rtol=0, atol=0
    )
    read = BlockInverse.from_state_dict(inverse.state_dict())
    torch.testing.assert_close(read.apply(vectors), inverse.apply(vectors), rtol=0, atol=0)
    single = closed_form(factors.to(dtype=torch.float32), setup.layout, 0.1)
    torch.testing.assert_close(
        single.apply(vectors.float()), inverse.apply(vectors).float(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.usefixtures("short")
def test_masks_of_another_kind_are_refused():
    state = {**fit(set_up(NAMES[0])).state_dict(), "fisher": "mixed"}
    _check_factors(state, "factors")
    name = next(key for key in state if key.endswith("/seen_in"))
    for wrong, match in ((state[name].double(), "truth values"), (~state[name], "q_in")):
        spoiled = copy.copy(state)
        spoiled[name] = wrong
        with pytest.raises(CorruptFileError, match=match):
            _check_factors(spoiled, "factors")
