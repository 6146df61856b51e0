"""Weights that are moved along a line and put back to the bit, and the weight decay that they get."""

import pytest
import torch
from influence_models import Net

from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.edits.editable_weights import EditableWeights, read_decays
from lightning_influence.model.layers.plan import find_layers


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Net(8)


@pytest.fixture
def weights(module):
    with torch.no_grad():
        module.body[0].weight[0, 0] = -0.0  # would not survive an addition of zero
    plan = find_layers(module)
    return EditableWeights(module, plan, dict.fromkeys(plan.layers, 0.5))


def bits(module):
    return {name: p.detach().clone().view(torch.int32) for name, p in module.named_parameters()}


def draw(weights, seed):
    return torch.randn(len(weights.flat()), generator=torch.Generator().manual_seed(seed))


def test_a_vector_and_the_parameters_are_the_same_numbers(module, weights):
    assert set(weights.parameters) == dict(module.named_parameters()).keys()
    change = draw(weights, 0)
    parts = weights.by_parameter(change)
    assert torch.equal(weights.join(parts), change)
    # Layer after layer, each row a channel with its bias last.
    rows = torch.cat([parts["body.0.weight"], parts["body.0.bias"][:, None]], dim=1)
    assert torch.equal(change[: rows.numel()].view_as(rows), rows)
    assert weights.decay.tolist() == [0.5] * len(change)


@pytest.mark.parametrize("step", [0.0, 0.25, -3.0])
def test_a_line_goes_where_single_moves_go(module, weights, step):
    before, start, unit = bits(module), draw(weights, 0), draw(weights, 1)
    start[::3] = unit[::3] = 0
    go = weights.prepare_line(start, unit)
    go(7.0)
    go(step)
    along = bits(module)
    weights.move(start + step * unit)
    assert all(torch.equal(along[name], value) for name, value in bits(module).items())
    moved = weights.flat()
    weights.restore()
    assert all(torch.equal(before[name], value) for name, value in bits(module).items())
    torch.testing.assert_close(moved, weights.flat() + start + step * unit)


def test_decay_is_that_which_is_given_or_recorded(module):
    plan = find_layers(module)
    assert read_decays(plan, None, None) == dict.fromkeys(plan.layers, 0.0)
    assert read_decays(plan, 0.2, None) == dict.fromkeys(plan.layers, 0.2)
    assert read_decays(plan, 0.2, TrainingRecord()) == dict.fromkeys(plan.layers, 0.2)
