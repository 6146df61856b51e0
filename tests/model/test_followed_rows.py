"""Losses by value on outputs whose rows are not the examples in order, against automatic differentiation."""

import pytest
import torch
from drive import mute
from torch import nn

from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.model.unnamed.unnamed_loss import UnnamedLoss
from lightning_influence.support.errors import UnsupportedModelError

B, T = 4, 6


def pinball(error):
    return torch.maximum(0.3 * error, -0.7 * error)


def time_first(net, x, y):
    """All steps, the time in front."""
    return net(x.transpose(0, 1)).transpose(0, 1)[..., 0] - y, None


def masked(net, x, y):
    """Steps at which there is a target: of each example another number."""
    kept = y > -0.5
    return net(x[kept])[:, 0] - y[kept], kept.nonzero()[:, 0]


def drawn(net, x, y):
    """Steps drawn at random from all examples."""
    chosen = torch.randperm(B * T)[:11]
    rows, targets = x.reshape(B * T, -1)[chosen], y.reshape(B * T)[chosen]
    return net(rows)[:, 0] - targets, chosen // T


class Module(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.net, self.step = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), step

    def training_step(self, batch, batch_idx):
        return pinball(self.step(self.net, *batch)[0]).mean()


def read(module, batch):
    layers = find_layers(module).layers
    unnamed = UnnamedLoss(lambda m, b: (None, m.training_step(b, 0)), layers, set())
    return unnamed.read(module, batch, B, lambda: Recorder(layers))[0]


@pytest.mark.parametrize("step", [time_first, masked, drawn])
def test_gradients_are_those_of_each_examples_rows(step):
    torch.manual_seed(0)
    module, batch = mute(Module(step)), (torch.randn(B, T, 3).double(), torch.randn(B, T).double())
    state = torch.get_rng_state()
    loss = read(module, batch)
    torch.set_rng_state(state)  # the same draw
    errors, owners = step(module.net, *batch)
    weight = module.net[0].weight
    for n in range(B):
        mine = errors[n] if owners is None else errors[owners == n]
        expected = torch.autograd.grad(B * pinball(mine).sum() / errors.numel(), weight, retain_graph=True)[0]
        value = (loss.outputs[n] * loss.gradient()[n]).sum()
        torch.testing.assert_close(torch.autograd.grad(value, weight, retain_graph=True)[0], expected)


@pytest.mark.parametrize("step", [time_first, masked])
def test_curvature_is_that_of_each_examples_rows(step):
    module, batch = mute(Module(step)), (torch.randn(B, T, 3).double(), torch.randn(B, T).double())
    module.training_step = lambda data, number: module.step(module.net, *data)[0].pow(4).mean()
    loss = read(module, batch)
    errors, owners = step(module.net, *batch)
    expected = torch.zeros(B, dtype=torch.float64)
    owners = torch.arange(B).repeat_interleave(T) if owners is None else owners
    expected.index_add_(0, owners, 12 * errors.flatten() ** 2 * B / errors.numel())
    torch.testing.assert_close(loss.column_energies().sum(1), expected.detach())


def test_examples_that_meet_are_refused_as_ever():
    module, batch = mute(Module(masked)), (torch.randn(B, T, 3).double(), torch.randn(B, T).double())
    module.training_step = lambda data, number: module.step(module.net, *data)[0].square().mean().sqrt()
    with pytest.raises(UnsupportedModelError, match="not made of losses of its examples"):
        read(module, batch)
