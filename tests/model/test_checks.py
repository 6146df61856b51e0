"""Whether examples depend on each other: exact in any precision, at any depth, for any two examples."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_influence.model.captured import Captured
from lightning_influence.model.checks import check_independent
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.support.errors import UnsupportedModelError


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x):
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def check(model, loss, x, dtype=None) -> None:
    recorder = Recorder(find_layers(model).layers)
    enabled = dtype is not None
    with recorder, torch.autocast("cpu", dtype or torch.bfloat16, enabled=enabled):
        values = loss(model(x))
    check_independent(Captured(len(x), None, values, recorder))


def own(outputs):
    return outputs.float().square().flatten(1).sum(1)


@pytest.mark.grid
@pytest.mark.parametrize("depth", [1, 8, 24])
@pytest.mark.parametrize("kind", ["autocast bfloat16", "autocast float16", "bfloat16", "float32", "float64"])
def test_deep_models_are_independent_in_every_precision(kind, depth) -> None:
    torch.manual_seed(depth)
    model = nn.Sequential(nn.Linear(6, 16), *(Residual(16) for _ in range(depth)), nn.Linear(16, 3))
    dtype = getattr(torch, kind.split()[-1])
    autocast = kind.startswith("autocast")
    model, x = (model, torch.randn(19, 6)) if autocast else (model.to(dtype), torch.randn(19, 6).to(dtype))
    check(model, own, x, dtype if autocast else None)


@pytest.mark.parametrize("count", [2, 3, 8, 9, 20, 70])
def test_any_two_examples_that_trade_places_are_seen(count) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(count, 4)
    check(model, own, x)
    draw = torch.Generator().manual_seed(1)
    pairs = [(0, count - 1), (count - 2, count - 1), (0, 8), (1, 17), (2, 66), (0, 64)]
    pairs += [tuple(torch.randperm(count, generator=draw)[:2].tolist()) for _ in range(5)]
    for one, other in [pair for pair in pairs if max(pair) < count]:
        order = torch.arange(count)
        order[one], order[other] = other, one
        with pytest.raises(UnsupportedModelError, match="depends on layer '' at other examples"):
            check(model, lambda outputs, order=order: own(outputs)[order], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_couplings_are_seen(dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).to(dtype), torch.randn(12, 4).to(dtype)
    for leak in (
        lambda outputs: own(outputs + 0.1 * outputs.roll(1, 0)),
        lambda outputs: own(outputs - outputs.mean(0)),
        lambda outputs: own(outputs) * torch.cat([torch.ones(11), 1 + outputs[5:6].float().sum(1)]),
    ):
        with pytest.raises(UnsupportedModelError, match="at other examples"):
            check(model, leak, x)


def test_gradients_of_zero_are_no_coupling() -> None:
    check(nn.Linear(4, 3), lambda outputs: own(outputs - outputs.detach()), torch.randn(5, 4))
