"""Every method, asked as users ask, answers as the oracle does."""

from __future__ import annotations

from itertools import pairwise

import oracle
import pytest
import torch
from influence_cases import CLOSE, CONVERGED, DAMPING, EXACTLY, Asked, gradients, quiet
from models import CASES, lightning_module, loader

from lightning_influence import InfluenceModule

LABELLED = [
    name for name in CASES if not any(k in name for k in ("mse", "probabilities", "soft", "circular_same"))
]
FEW = ["mlp_gelu", "tokens_weighted", "conv2d_reflect_groups", "segmentation"]


@pytest.mark.grid
@pytest.mark.parametrize("method", ["identity", "exact", "hessian", "block_ggn", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("name", CASES)
def test_scores_of_every_method(name, method):
    asked = Asked(CASES[name])
    found = asked.scores(method=method, **EXACTLY)
    torch.testing.assert_close(found.scores, asked.expected(method), **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_converged_scores_of_auto(name):
    asked = Asked(CASES[name])
    found = asked.scores(**CONVERGED)
    torch.testing.assert_close(found.scores, asked.expected("exact"), **CLOSE)
    assert found.diagnostics.residuals.max() < 1e-8
    assert found.train_indices.tolist() == list(range(12))
    assert found.query_indices.tolist() == [0, 1, 2]


@pytest.mark.grid
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("method", ["diagonal", "kfac", "ekfac", "exact", "block_ggn"])
def test_empirical_fisher(name, method):
    asked = Asked(CASES[name])
    found = asked.scores(method=method, fisher="empirical", low_rank_tolerance=0.0)
    torch.testing.assert_close(found.scores, asked.expected(method, fisher="empirical"), **CLOSE)


@pytest.mark.parametrize("name", LABELLED)
def test_measurements_of_labels(name):
    asked = Asked(CASES[name])
    for measurement in ("margin", "logit"):
        found = asked.scores(method="exact", measurement=measurement)
        torch.testing.assert_close(found.scores, asked.expected("exact", measurement=measurement), **CLOSE)


def loss(module, batch):
    """A user's function that is called like the library's own measurement."""
    return module(batch[0]).gather(1, batch[1][:, None])[:, 0]


@pytest.mark.parametrize("method", ["identity", "ekfac", "exact", "auto"])
def test_callable_and_hook_measure_what_they_return(method):
    asked = Asked(CASES["mlp_gelu"])
    options = {**(CONVERGED if method == "auto" else EXACTLY), "method": method}
    found = asked.scores(measurement=loss, **options)
    expected = asked.expected(method, measurement="logit")
    torch.testing.assert_close(found.scores, expected, **CLOSE)
    asked.module.model.influence_measurement = lambda batch: loss(asked.module.model, batch)
    for measurement in (None, "hook"):
        again = asked.scores(measurement=measurement, **options)
        torch.testing.assert_close(again.scores, expected, **CLOSE)
        assert again.diagnostics.measurement == "hook"


@pytest.mark.grid
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("method", ["diagonal", "kfac", "ekfac", "block_ggn", "exact", "auto"])
def test_heuristic_damping_a_layer(name, method):
    asked = Asked(CASES[name])
    options = {**(CONVERGED if method == "auto" else EXACTLY), "method": method}
    found = asked.scores(damping="heuristic", **options)
    damping = found.diagnostics.damping
    assert list(damping) == [f"model.{layer}" for layer in CASES[name].layers]
    start = 0
    curvature = asked.curvature("exact").diagonal()  # its trace is that of the factors' squares
    for key, numel in found.diagnostics.layers.items():
        assert damping[key] == pytest.approx(0.1 * curvature[start : start + numel].mean().item(), rel=1e-9)
        start += numel
    torch.testing.assert_close(found.scores, asked.expected(method, damping), **CLOSE)


@pytest.mark.grid
@pytest.mark.parametrize("name", ["mlp_relu_inplace_weighted", "tokens"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(name, reduction):
    case = CASES[name].with_reduction(reduction)
    asked = Asked(case)
    H = asked.curvature("exact")
    assert torch.equal(H, H.T) or torch.allclose(H, H.T)
    found = asked.scores(method="exact")
    wbar = case.loss.normaliser(case.y)
    problem = (case.model, case.loss, case.x, case.y, case.layers)
    train = oracle.flatten(oracle.per_example_gradients(*problem))
    queries = oracle.per_example_gradients(
        case.model, case.loss, case.query_x, case.query_y, case.layers, wbar
    )
    expected = oracle.influence(H, DAMPING, oracle.flatten(queries), train)
    torch.testing.assert_close(found.scores, expected, **CLOSE)


@pytest.mark.grid
@pytest.mark.parametrize(
    "method", ["identity", "diagonal", "kfac", "ekfac", "block_ggn", "exact", "hessian", "auto"]
)
@pytest.mark.parametrize("name", ["mlp_relu_inplace_weighted", "tokens_class_first"])
def test_self_influence_is_the_diagonal(name, method):
    asked = Asked(CASES[name])
    options = {**EXACTLY, "method": method}
    found = asked.self_influence(**options)
    # Without Krylov steps, which self-influence does not take.
    scores = asked.scores(queries=loader(CASES[name], 4), max_steps=0, **options)
    torch.testing.assert_close(found.scores, scores.scores.diagonal(), **CLOSE)
    assert found.scores.min() >= 0  # zero for an example that is padding only
    assert found.scores.median() > 0


@pytest.mark.parametrize(
    "method", ["identity", "diagonal", "kfac", "ekfac", "block_ggn", "exact", "hessian", "auto"]
)
def test_batch_sizes_do_not_matter(method):
    name = "tokens_weighted"
    options = {**(CONVERGED if method == "auto" else EXACTLY), "method": method}
    first = Asked(CASES[name]).scores(1, 3, **options).scores
    for batch, query_batch in ((7, 1), (12, 2), (11, 3)):
        other = Asked(CASES[name]).scores(batch, query_batch, **options).scores
        torch.testing.assert_close(other, first, **CLOSE)


@pytest.mark.grid
@pytest.mark.parametrize("options", [{}, {"tolerance": 0.02, "max_steps": 20}, {"max_steps": 0}])
@pytest.mark.parametrize("name", ["mlp_gelu", "conv2d"])
def test_a_query_alone_is_answered_as_among_others(name, options):
    asked = Asked(CASES[name])
    options = {**EXACTLY, "method": "auto", **options}
    together = asked.scores(**options)
    tolerance = options.get("tolerance", 0.2) if options.get("max_steps", 3) else 1e-9
    x, y = CASES[name].query_x, CASES[name].query_y
    for q in range(3):
        alone = asked.scores(queries=[(x[q : q + 1], y[q : q + 1])], **options)
        error = (alone.scores[0] - together.scores[q]).norm() / together.scores[q].norm()
        assert error <= 3 * tolerance  # the tolerance is on residuals; the solutions differ by a little more


@pytest.mark.slow
def test_auto_approaches_exact_with_steps_and_anchors():
    asked = Asked(CASES["mlp_silu_smoothing"])
    exact = asked.expected("exact")

    def error(steps, budget=2**30):
        fresh = Asked(CASES["mlp_silu_smoothing"])
        options = {**CONVERGED, "max_steps": steps, "memory_budget": budget}
        return float((fresh.scores(**options).scores - exact).norm() / exact.norm())

    errors = [error(steps) for steps in (1, 2, 3, 5, 12)]
    assert all(later < 0.7 * earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-6
    each = 3 * 8 * sum(asked.scores(**CONVERGED).diagnostics.layers.values())
    few = error(0, 12 * each)  # room for one anchor, and for no more in low rank
    assert error(0) < 0.7 * few


@pytest.mark.grid
@pytest.mark.parametrize("method", ["identity", "kfac", "ekfac", "block_ggn", "exact", "hessian", "auto"])
@pytest.mark.parametrize("name", ["mlp_tanh_no_bias", "conv2d_reflect_groups", "segmentation"])
def test_ihvp(name, method):
    asked = Asked(CASES[name])
    case = CASES[name]
    found, diagnostics = asked.ihvp(**{**(CONVERGED if method == "auto" else EXACTLY), "method": method})
    queries = gradients(name, "loss")
    if method == "identity":  # which knows of no weights
        flat = queries * case.loss.normaliser(case.y)
    else:
        H = asked.curvature(method)
        flat = torch.linalg.solve(H + DAMPING * torch.eye(len(H), dtype=H.dtype), queries.T).T
    matrices = oracle.unflatten(flat, case.model, case.layers)
    parameters = dict(asked.module.model.named_parameters())
    covered = {f"model.{layer}.{kind}" for layer in case.layers for kind in ("weight", "bias")}
    assert found.keys() == covered & parameters.keys()
    for layer in case.layers:
        rows, weight = matrices[layer].flatten(1, 2), parameters[f"model.{layer}.weight"]
        own = found[f"model.{layer}.weight"]
        assert own.shape == (3, *weight.shape)
        inputs = weight[0].numel()
        torch.testing.assert_close(own.flatten(2), rows[..., :inputs], **CLOSE)
        if f"model.{layer}.bias" in found:
            torch.testing.assert_close(found[f"model.{layer}.bias"], rows[..., -1], **CLOSE)
    assert (diagnostics.residuals is None) == (method in {"identity", "kfac", "ekfac"})


def test_dtypes_and_passes():
    case = CASES["mlp_gelu"]
    module = InfluenceModule(lightning_module(case).float())
    data = [(case.x.float(), case.y)]
    with quiet():
        first = module.scores(data, data)
        second = module.scores(data, data)
    assert first.scores.dtype == torch.float32
    torch.testing.assert_close(first.scores, second.scores)
    assert second.diagnostics.passes[0]["name"] == "Influence: query gradients"
    assert len(first.diagnostics.passes) > len(second.diagnostics.passes)
    module.model.double()  # the same weights in another precision: what was kept is of no use
    data = [(case.x, case.y)]
    with quiet():
        third = module.scores(data, data)
    assert third.scores.dtype == torch.float64
    torch.testing.assert_close(third.scores, first.scores.double(), rtol=0.05, atol=1e-3)


def test_several_loaders_of_queries():
    case = CASES["mlp_gelu"]
    asked = Asked(case)
    whole = asked.scores(method="kfac")
    both = asked.scores(method="kfac", queries=[loader(case, 2, queries=True), loader(case, 3, queries=True)])
    assert both.query_dataloaders.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(both.scores, torch.cat([whole.scores, whole.scores]))
    assert whole.query_dataloaders is None


def test_a_single_training_example():
    case = CASES["mlp_gelu"].head(1)
    for method in ("identity", "diagonal", "kfac", "ekfac", "exact", "auto"):
        module = InfluenceModule(lightning_module(case))
        with quiet():
            found = module.scores([(case.x, case.y)], [(case.x, case.y)], method=method, damping=0.1, top_k=3)
        assert found.top(1).indices.tolist() == [[0]]
        assert float(found.top(1).scores) > 0
