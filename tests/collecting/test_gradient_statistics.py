"""Figures from factored gradients against per-example gradients written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_influence.collecting.figures import (
    estimate_noise_and_signal,
    measure_gradient_norms,
    measure_spectrum,
    sum_squared_norms,
)
from lightning_influence.curvature.factors import Factors, LayerStatistics
from lightning_influence.model.layers.gradients import FactoredGradients
from lightning_influence.model.layers.plan import find_layers

G = torch.Generator().manual_seed(0)


def gradients(positions: int, groups: int) -> dict[str, FactoredGradients]:
    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=G, dtype=torch.float64) + 0.4

    return {
        "a": FactoredGradients(make(1, 7, 1, 4), make(1, 1, 7, 1, 3)),
        "b": FactoredGradients(make(groups, 7, positions, 5), make(1, groups, 7, positions, 2)),
    }


@pytest.mark.parametrize(("positions", "groups"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_norms_and_noise_scale(positions, groups) -> None:
    batch = gradients(positions, groups)
    each = torch.cat([layer.dense()[0].flatten(1) for layer in batch.values()], 1)  # (B, P)
    torch.testing.assert_close(sum_squared_norms(batch), each.square().sum(1), rtol=1e-12, atol=0)
    noise, signal = estimate_noise_and_signal(batch)
    assert noise == pytest.approx(each.var(dim=0).sum().item(), rel=1e-12)
    # Unbiased: the mean over pairs of different examples of the product of their gradients.
    products = each @ each.T
    pairs = (products.sum() - products.trace()) / (7 * 6)
    assert signal == pytest.approx(pairs.item(), rel=1e-10)


def test_one_example_has_no_noise() -> None:
    assert (
        estimate_noise_and_signal({
            name: layer.select(slice(0, 1)) for name, layer in gradients(1, 1).items()
        })
        is None
    )


def test_spectrum() -> None:
    layer = LayerStatistics.zeros((1, 2, 2))
    factors = Factors({"a": layer}, weight_sum=8.0, weight_examples=4.0)
    assert measure_spectrum(factors) == {}
    layer.squares, layer.squares_examples = torch.tensor([[[8.0, 4.0], [4.0, 0.0]]]), 4.0
    assert measure_spectrum(factors) == {"trace": 2.0, "top_eigenvalue": 1.0, "stable_rank": 2.0}


def test_gradient_norms() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.LayerNorm(1), nn.Linear(1, 1, bias=False))
    layers = find_layers(model).layers
    assert measure_gradient_norms(model, layers) == {}
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    found = measure_gradient_norms(model, layers)
    assert found == pytest.approx({"grad_norm": 24**0.5, "grad_norm/0": 12**0.5, "grad_norm/2": 2.0})


def test_norms_of_sparse_gradients() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 3, sparse=True), "out": nn.Linear(3, 2)})
    model["out"](model["table"](torch.tensor([1, 1, 4]))).square().sum().backward()
    whole = torch.cat([p.grad.to_dense().flatten() for p in model.parameters()])
    assert model["table"].weight.grad.is_sparse
    norms = measure_gradient_norms(model, find_layers(model, ["out"]).layers)
    assert norms["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-6)
