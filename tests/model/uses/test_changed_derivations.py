"""Tensors made of parameters that are changed in place before they are used."""

import pytest
import torch
from use_oracle import Formula, numbers, reference_gradients, squared_loss

from lightning_influence.model.uses import Watch, Way, differentiate_losses


def added(p, x):
    weight = p.first * 2
    weight.add_(p.second)
    weight *= 0.5
    return x @ weight


def drawn(p, x):
    """As variational layers draw their weights."""
    weight = torch.zeros_like(p.first)
    weight += p.second.exp()
    weight.mul_(numbers(3, 4, seed=8)).add_(p.first)
    return torch.nn.functional.linear(x, weight.T)


@pytest.mark.parametrize("formula", [added, drawn])
def test_changes_in_place_are_followed_to_their_parameters(formula):
    model = Formula(formula, first=(3, 4), second=(3, 4))
    batch = numbers(5, 3), numbers(5)
    watch = Watch(dict(model.named_parameters()), batch, 5)
    with watch:
        losses = squared_loss(model, batch)
    found = differentiate_losses(watch, losses)
    for name, expected in reference_gradients(model, batch, squared_loss).items():
        assert found.report.parameters[name].way is Way.USES
        torch.testing.assert_close(found.gradients[name].dense()[0], expected)
