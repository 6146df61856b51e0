"""cg, minres and astra, asked as users ask, against the oracle; and what all iterative methods share."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from influence_cases import CLOSE, DAMPING, EXACTLY, Asked, gradients, quiet
from influence_models import Net, fitted, names, queries, train, trainer
from models import CASES, lightning_module, loader

from lightning_influence import InfluenceModule, influence
from lightning_influence.curvature.stored import StoragePass
from lightning_influence.model.layers.plan import Layout, find_layers
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.running.reading import prepare_train
from lightning_influence.support.errors import (
    DivergenceError,
    IndefiniteError,
    InfluenceWarning,
    UnsupportedModelError,
)

CONVERGED: dict[str, dict[str, Any]] = {
    "cg": {"tolerance": 1e-11, "max_steps": 500},
    "minres": {"tolerance": 1e-11, "max_steps": 500},
    "astra": {"tolerance": 1e-11, "max_steps": 5000},
}
FEW = ["mlp_gelu", "tokens_weighted", "conv2d_reflect_groups", "segmentation"]


@pytest.mark.grid
@pytest.mark.parametrize("method", CONVERGED)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_exact_ones(name, method):
    asked = Asked(CASES[name])
    found = asked.scores(method=method, **EXACTLY, **CONVERGED[method])
    torch.testing.assert_close(found.scores, asked.expected("exact"), **CLOSE)
    assert found.diagnostics.residuals.max() <= 1e-11
    assert found.diagnostics.extra["solver"]["solved"] == 3
    assert found.diagnostics.method == method


@pytest.mark.grid
@pytest.mark.parametrize("method", CONVERGED)
@pytest.mark.parametrize("name", FEW)
def test_heuristic_damping_a_layer(name, method):
    asked = Asked(CASES[name])
    found = asked.scores(damping="heuristic", method=method, **EXACTLY, **CONVERGED[method])
    damping = found.diagnostics.damping
    assert len(set(damping.values())) == len(damping)
    torch.testing.assert_close(found.scores, asked.expected("exact", damping), **CLOSE)


@pytest.mark.parametrize("method", CONVERGED)
def test_passes_a_product_answer_alike(method):
    asked = Asked(CASES["tokens_weighted"])
    options = {**EXACTLY, **CONVERGED[method], "tolerance": 1e-8}
    found = asked.scores(method=method, memory_budget=6000, **options)
    assert found.diagnostics.extra["curvature"] == "Gauss-Newton, a pass a product"
    torch.testing.assert_close(found.scores, asked.expected("exact"), rtol=1e-4, atol=1e-8)
    assert names(found).count("curvature products") > 3


@pytest.mark.grid
@pytest.mark.parametrize("preconditioner", ["ekfac", "two_level", "none"])
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_preconditioners(method, preconditioner):
    steps = {}
    for name in FEW:
        asked = Asked(CASES[name])
        options = {**EXACTLY, **CONVERGED[method], "preconditioner": preconditioner}
        found = asked.scores(method=method, **options)
        torch.testing.assert_close(found.scores, asked.expected("exact"), **CLOSE)
        assert found.diagnostics.extra["preconditioner"] == preconditioner
        steps[name] = found.diagnostics.extra["solver"]["steps"][0]
    assert min(steps.values()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_gelu", "conv2d", "tokens", "mlp_mse"])
def test_minres_solves_with_an_indefinite_hessian(name):
    case = CASES[name]
    H = oracle.hessian(case.model, case.loss, case.x, case.y, case.layers)
    values = torch.linalg.eigvalsh(H)
    asked = Asked(case)
    damping = float(-values[0]) / 2 + 1e-3 if values[0] < 0 else DAMPING
    for preconditioner in ("ekfac", "none"):
        found = asked.scores(
            method="minres",
            curvature="hessian",
            damping=damping,
            preconditioner=preconditioner,
            **EXACTLY,
            **CONVERGED["minres"],
        )
        expected = oracle.influence(H, damping, gradients(name, "loss"), gradients(name))
        torch.testing.assert_close(found.scores, expected, rtol=1e-5, atol=1e-8)
    assert found.diagnostics.extra["curvature"] == "Hessian, a pass a product"


def test_cg_names_negative_curvature_and_solves_above_it():
    name = "mlp_gelu"
    case = CASES[name]
    H = oracle.hessian(case.model, case.loss, case.x, case.y, case.layers)
    smallest = float(torch.linalg.eigvalsh(H)[0])
    assert smallest < -0.01
    asked = Asked(case)
    options = {"method": "cg", "curvature": "hessian", **EXACTLY, **CONVERGED["cg"]}
    with pytest.raises(IndefiniteError, match=r"met negative curvature: .* use method='minres'"):
        asked.scores(damping=-smallest / 10, **options)
    found = asked.scores(damping=-2 * smallest, **options)
    expected = oracle.influence(H, -2 * smallest, gradients(name, "loss"), gradients(name))
    torch.testing.assert_close(found.scores, expected, **CLOSE)


def test_one_step_of_astra_is_ekfac():
    for name in FEW:
        asked = Asked(CASES[name])
        found = asked.scores(method="astra", step_size=1.0, momentum=0.9, max_steps=1, **EXACTLY)
        torch.testing.assert_close(found.scores, asked.expected("ekfac"), **CLOSE)
        assert found.diagnostics.extra["astra"]["step"] == 1.0


def test_astra_with_minibatches():
    asked = Asked(CASES["mlp_gelu"])
    found = asked.scores(method="astra", batch_size=6, tolerance=1e-3, max_steps=5000, **EXACTLY)
    exact = asked.expected("exact")
    assert found.diagnostics.residuals.max() <= 1e-3
    assert float((found.scores - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("method", CONVERGED)
def test_self_influence_is_the_diagonal(method):
    asked = Asked(CASES["tokens_weighted"])
    options = {"method": method, **EXACTLY, **CONVERGED[method]}
    found = asked.self_influence(**options)
    scores = asked.scores(queries=loader(asked.case, 4), **options).scores
    torch.testing.assert_close(found.scores, scores.diagonal(), **CLOSE)


def test_self_influence_where_every_product_is_a_pass_is_refused():
    asked = Asked(CASES["mlp_gelu"])
    for options in ({"memory_budget": 1000}, {"curvature": "hessian"}):
        with pytest.raises(UnsupportedModelError, match="solves one system for every training example"):
            asked.self_influence(method="cg", **options)


@pytest.mark.parametrize("method", CONVERGED)
def test_ihvp_and_top_k(method):
    asked = Asked(CASES["conv2d_reflect_groups"])
    options = {"method": method, **EXACTLY, **CONVERGED[method]}
    found, diagnostics = asked.ihvp(**options)
    exact, _ = asked.ihvp(**{**EXACTLY, "method": "exact"})
    assert found.keys() == exact.keys()
    for key, value in exact.items():
        torch.testing.assert_close(found[key], value, **CLOSE)
    assert diagnostics.residuals.shape == (3,)
    top = asked.scores(top_k=2, **options).top(2)
    best = asked.expected("exact").topk(2, dim=1)
    torch.testing.assert_close(top.scores, best.values, **CLOSE)


@pytest.mark.parametrize("method", [*CONVERGED, "lissa"])
def test_groups_under_a_small_budget_answer_alike(method):
    """Each query alone in its group, as far as the stored gradients leave room."""
    asked = Asked(CASES["mlp_gelu"])
    options = {"method": method, **EXACTLY, **CONVERGED.get(method, {"tolerance": 1e-4})}
    together = asked.scores(**options)
    assert len(together.diagnostics.extra["solver"]["steps"]) == 1
    alone = asked.scores(memory_budget=8000, **options)
    assert len(alone.diagnostics.extra["solver"]["steps"]) == 3
    close = CLOSE if method in CONVERGED else {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(alone.scores, together.scores, **close)


def test_what_is_left_unsolved_is_said():
    asked = InfluenceModule(lightning_module(CASES["mlp_gelu"]))
    data = loader(CASES["mlp_gelu"], 5), loader(CASES["mlp_gelu"], 2, queries=True)
    with pytest.warns(
        InfluenceWarning, match=r"3 of 3 queries were left .* above the tolerance 0.001 .*'cg'"
    ):
        found = asked.scores(*data, method="cg", damping=1e-4, max_steps=2)
    assert found.diagnostics.residuals.min() > 1e-3
    assert found.diagnostics.extra["solver"]["steps"] == [2]
    assert any("were left with a relative residual" in warning for warning in found.diagnostics.warnings)


REFUSED = [
    ("astra", {"curvature": "hessian"}, ValueError, "Got curvature='hessian' with method='astra'"),
    ("cg", {"curvature": "fisher"}, ValueError, "Got curvature='fisher'; accepted are 'ggn', 'hessian'"),
    ("cg", {"preconditioner": "kfac"}, ValueError, "Got preconditioner='kfac'; accepted are 'ekfac'"),
    ("astra", {"momentum": 1.0}, ValueError, "Got momentum=1.0; accepted are numbers below 1"),
    ("astra", {"step_size": 0.0}, ValueError, "Got step_size=0.0; accepted are finite numbers above 0"),
    ("astra", {"batch_size": 0}, ValueError, "Got batch_size=0; accepted are integers of at least 1"),
    ("astra", {"damping": 0.0}, ValueError, "Got a damping of 0; ASTRA accepts positive ones"),
    ("astra", {"batch_size": 13}, ValueError, "Got batch_size=13; accepted are 1 to 12"),
    ("astra", {"step_size": 99.0}, DivergenceError, "step_size=99 with momentum .* diverges"),
]


@pytest.mark.parametrize(("method", "options", "error", "message"), REFUSED)
def test_settings_that_cannot_work(method, options, error, message):
    asked = Asked(CASES["mlp_gelu"])
    with pytest.raises(error, match=message):
        asked.scores(method=method, **options)


@pytest.mark.parametrize("method", ["astra", "lissa"])
def test_damping_that_a_rule_finds_to_be_zero_is_no_bad_argument(method):
    case = CASES["mlp_gelu"]
    module = lightning_module(case)
    module.torch_loss = lambda outputs, targets, reduction="mean": (
        (outputs - outputs.detach()).square().mean()
    )
    asked, batches = InfluenceModule(module), [(case.x, case.y)]
    with quiet(), pytest.raises(UnsupportedModelError, match="damping='heuristic' is 0 here"):
        asked.scores(batches, batches, method=method, damping="heuristic", fisher="empirical")


@pytest.mark.parametrize("method", ["cg", "minres", "astra", "lissa"])
def test_through_a_trainer(method, tmp_path):
    host, _ = fitted()
    options = {"method": method, "log": False, "damping": 0.1}
    with quiet():
        exact = host.influence(query_dataloaders=queries(), **{**options, "method": "exact"})
        found = host.influence(query_dataloaders=queries(), **options)
        again = host.influence(query_dataloaders=queries(), tolerance=1e-4, **options)
        alone = host.self_influence(**options)
    assert torch.equal(found.train_indices, torch.arange(22))
    error = float((found.scores - exact.scores).norm() / exact.scores.norm())
    assert error < {"cg": 2e-3, "minres": 2e-3, "astra": 0.02, "lissa": 0.05}[method]
    assert float((again.scores - exact.scores).norm() / exact.scores.norm()) < min(error, 2e-3)
    assert alone.scores.min() > 0
    path = tmp_path / "attributions"
    found.save(path)
    restored = type(found).load(path)
    assert restored.diagnostics.extra["solver"]["steps"] == found.diagnostics.extra["solver"]["steps"]
    text = dict(found.diagnostics.facts())
    assert "steps" in text["solver"]


def test_a_plain_trainer_and_float32():
    module = Net()
    host = trainer()
    host.fit(module, train())
    with quiet():
        found = influence(host, query_dataloaders=queries(), method="cg", damping=0.05, log=False)
        exact = influence(host, query_dataloaders=queries(), method="exact", damping=0.05, log=False)
    torch.testing.assert_close(found.scores.double(), exact.scores.double(), rtol=0.02, atol=1e-4)
    assert found.diagnostics.residuals.max() <= 1e-3


def test_estimates_of_the_fisher():
    asked = Asked(CASES["tokens_weighted"])
    for fisher in ("empirical", "exact"):
        options = {"fisher": fisher, "low_rank_tolerance": 0.0}
        found = asked.scores(method="cg", **options, **CONVERGED["cg"])
        torch.testing.assert_close(
            found.scores, asked.scores(method="exact", **options).scores, rtol=1e-6, atol=1e-9
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "budget"), [*((name, 2**30) for name in (*CONVERGED, "lissa")), ("cg", 4000), ("minres", 4000)]
)
def test_residuals_in_float32_are_known_better_than_the_answers(method, budget):
    """At the limit of float32, where a product's own rounding is as large as the residual."""
    module = Net().eval()
    data, damping = train(shuffle=False), 1 / 64  # a number of float32
    options = {"damping": damping, "fisher": "exact", "tolerance": 1e-9, "memory_budget": budget}
    limit = {} if method == "lissa" else {"max_steps": 400 if budget > 4000 else 40}
    asked = InfluenceModule(module)
    with quiet():
        answers, diagnostics = asked.ihvp(data, queries(), method=method, **options, **limit)
        right, _ = asked.ihvp(data, queries(), method="identity")
    runner, plan = LoopRunner(module), find_layers(module)
    one_pass, batches = StoragePass(plan, limit=2**28, num_examples=22), prepare_train(data)
    with runner:
        runner.run(one_pass, batches)
    stored = one_pass.operator(Layout.of(plan.layers), batches.indices, lambda t: t)

    def flat(by_name):
        pairs = [(by_name[f"{name}.weight"], by_name[f"{name}.bias"]) for name in plan.layers]
        parts = [torch.cat([weight, bias[..., None]], dim=-1) for weight, bias in pairs]
        return torch.cat([part.flatten(1) for part in parts], dim=1).double()

    x, v = flat(answers), flat(right)
    truth = (v - x @ stored.dense() - damping * x).norm(dim=1) / v.norm(dim=1)
    assert 1e-9 < truth.max() < 1e-4
    assert ("a pass a product" in diagnostics.extra["curvature"]) == (budget == 4000)
    torch.testing.assert_close(diagnostics.residuals.double(), truth, rtol=1e-3, atol=0)
