"""LiSSA with nothing to tune, on every model of the zoo; and what it says when it is told what to do."""

from __future__ import annotations

from functools import cache
from typing import Any

import oracle
import pytest
import torch
from influence_cases import quiet
from models import lightning_module, loader
from torch import Tensor
from torch.utils.data import DataLoader
from zoo import ZOO, zoo

from lightning_influence import InfluenceModule
from lightning_influence.support.errors import DivergenceError, InfluenceWarning

# What is promised; 1e-3 to 5 are the dampings it is promised for.
RELATIVE_ERROR = 0.05
DAMPINGS = (1e-3, 3e-2, 1.0, 5.0)


@cache
def dense(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The Gauss-Newton matrix, and the gradients of the training examples and the queries."""
    case = zoo(name)
    problem = (case.model, case.loss, case.x, case.y, case.layers)
    wbar = case.loss.normaliser(case.y)
    queries = (case.model, case.loss, case.query_x, case.query_y, case.layers)
    return (
        oracle.ggn(*problem),
        oracle.flatten(oracle.per_example_gradients(*problem)),
        oracle.flatten(oracle.per_example_gradients(*queries, wbar)),
    )


def module_of(name: str) -> InfluenceModule:
    return InfluenceModule(lightning_module(zoo(name)))


def data(name: str) -> tuple[DataLoader, DataLoader]:
    return loader(zoo(name), 32), loader(zoo(name), 2, queries=True)


def flat(name: str, answer: dict[str, Tensor]) -> Tensor:
    """An answer by parameter as rows in the oracle's order."""
    parts = []
    for layer in zoo(name).layers:
        if f"model.{layer}" in answer:  # a parameter by itself
            parts.append(answer[f"model.{layer}"].flatten(1))
            continue
        weight = answer[f"model.{layer}.weight"].flatten(2)
        bias = answer.get(f"model.{layer}.bias")
        rows = weight if bias is None else torch.cat([weight, bias[..., None]], dim=-1)
        parts.append(rows.flatten(1))
    return torch.cat(parts, dim=1)


def worst_error(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_it_converges_with_no_argument(name):
    G, train, queries = dense(name)
    own = module_of(name)
    for damping in DAMPINGS:
        exact = torch.linalg.solve(G + damping * torch.eye(len(G), dtype=G.dtype), queries.T).T
        with quiet():
            answer, diagnostics = own.ihvp(*data(name), method="lissa", damping=damping)
        assert worst_error(flat(name, answer), exact) <= RELATIVE_ERROR
        assert diagnostics.extra["lissa"]["why"]
        assert diagnostics.extra["solver"]["solved"] == len(queries)
    with quiet():
        scores = own.scores(*data(name), method="lissa", damping=5.0).scores
    assert worst_error(scores, exact @ train.T / len(train)) <= RELATIVE_ERROR


def diagnostics_of(name: str, **options: Any) -> Any:
    with quiet():
        return module_of(name).scores(*data(name), method="lissa", **options).diagnostics


def test_it_says_what_it_chose():
    found = diagnostics_of("mlp_gelu", damping=0.1)
    G, _, _ = dense("mlp_gelu")
    chosen = found.extra["lissa"]
    assert chosen["lambda_1"] == pytest.approx(float(torch.linalg.eigvalsh(G)[-1]), rel=0.05)
    assert chosen["trace"] == pytest.approx(float(G.trace()), rel=1e-9)
    assert 0 < chosen["kappa"] < len(G)
    assert chosen["variant"] in {"full", "minibatch"}
    assert "example products" in chosen["why"]
    assert found.residuals.max() <= 0.02
    history = found.extra["solver"]["largest_residual_by_step"][0]
    assert history[0] == pytest.approx(1.0)
    assert len(history) == found.extra["solver"]["steps"][0] + 2  # the last is of the product that verifies


@pytest.mark.parametrize("name", ["mlp_gelu", "cnn", "transformer_classifier", "mlp_two_targets"])
def test_minibatches_converge_to_the_exact_solution(name):
    G, _, queries = dense(name)
    damping = 0.3
    exact = torch.linalg.solve(G + damping * torch.eye(len(G), dtype=G.dtype), queries.T).T
    for tolerance in (0.05, 1e-3):
        with quiet():
            answer, diagnostics = module_of(name).ihvp(
                *data(name), method="lissa", damping=damping, batch_size=24, tolerance=tolerance
            )
        assert diagnostics.extra["lissa"]["variant"] == "minibatch"
        assert diagnostics.residuals.max() <= tolerance
        assert worst_error(flat(name, answer), exact) <= tolerance


@pytest.mark.slow
def test_products_in_passes_answer_as_products_in_memory():
    """Where the gradients do not fit, products are passes, and the scale comes from minibatches."""
    name = "mlp_regression"
    G, _, queries = dense(name)
    exact = torch.linalg.solve(G + torch.eye(len(G), dtype=G.dtype), queries.T).T
    for options in ({}, {"batch_size": 16}):
        with quiet():
            answer, diagnostics = module_of(name).ihvp(
                *data(name), method="lissa", damping=1.0, memory_budget=20_000, **options
            )
        assert diagnostics.extra["curvature"] == "Gauss-Newton, a pass a product"
        assert worst_error(flat(name, answer), exact) <= RELATIVE_ERROR


def test_a_batch_that_is_too_small_is_named_beforehand():
    own = module_of("mlp_gelu")
    with pytest.warns(
        InfluenceWarning, match=r"batch_size=1 is too small .* ask for \d+\. LiSSA takes steps"
    ):
        own.scores(*data("mlp_gelu"), method="lissa", damping=0.3, batch_size=1)


def test_steps_that_diverge_are_refused_beforehand():
    own = module_of("mlp_gelu")
    largest = diagnostics_of("mlp_gelu", damping=0.5).extra["lissa"]["lambda_1"]
    step = 1.9 / (largest + 0.5)
    for options, message in (
        ({"step_size": 50.0}, r"step_size=50 is too large: .*2 / \(lambda_1 \+ damping\) = "),
        ({"step_size": step, "batch_size": 2}, r"batch_size=2 is too small for step_size=[\d.]+: "),
    ):
        with quiet(), pytest.raises(DivergenceError, match=message):
            own.scores(*data("mlp_gelu"), method="lissa", damping=0.5, **options)


def test_settings_it_cannot_use():
    own = module_of("mlp_gelu")
    for options, message in (
        ({"damping": 0.0}, "Got a damping of 0; LiSSA accepts positive ones"),
        ({"batch_size": 97}, "Got batch_size=97; accepted are 1 to 96"),
        ({"curvature": "hessian"}, "Got curvature='hessian' with method='lissa'; accepted is 'ggn'"),
    ):
        with quiet(), pytest.raises(ValueError, match=message):
            own.scores(*data("mlp_gelu"), method="lissa", **{"damping": 1.0, **options})


def test_too_few_steps_are_named_and_leave_a_residual():
    own = module_of("mlp_gelu")
    with pytest.warns(InfluenceWarning) as caught:
        found = own.scores(*data("mlp_gelu"), method="lissa", damping=1e-3, max_steps=3)
    said = " ".join(str(warning.message) for warning in caught)
    assert "LiSSA needs about" in said
    assert "were left with a relative residual above the tolerance 0.02" in said
    assert found.diagnostics.residuals.min() > 0.02
    assert found.diagnostics.extra["solver"]["steps"] == [3]


def test_self_influence():
    name = "mlp_regression"
    G, train, _ = dense(name)
    with quiet():
        found = module_of(name).self_influence(loader(zoo(name), 32), method="lissa", damping=0.1).scores
    exact = torch.linalg.solve(G + 0.1 * torch.eye(len(G), dtype=G.dtype), train.T).T
    expected = (exact * train).sum(dim=1) / len(train)
    assert float((found - expected).norm() / expected.norm()) <= RELATIVE_ERROR
