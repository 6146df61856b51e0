import pytest
import torch
from models import CASES
from torch import nn

from lightning_influence.model.layers import full_precision, split_rows
from lightning_influence.model.plan import find_layers


@pytest.mark.parametrize("name", sorted(CASES))
def test_matrix_form_is_weight_rows_and_bias_column(name):
    for layer in find_layers(CASES[name].model, parameters=False).layers.values():
        weight = torch.randn(2, *layer.module.weight.shape)
        bias = torch.randn(2, *layer.module.bias.shape) if layer.has_bias else None
        matrix = layer.from_parameters(weight, bias)
        assert matrix.shape == (2, *layer.shape)
        assert layer.numel == matrix[0].numel()
        rows = matrix.flatten(1, 2)
        assert torch.equal(rows[..., : weight[0, 0].numel()], weight.flatten(2))
        back = layer.to_parameters(matrix)
        assert torch.equal(back[0], weight)
        if bias is None:
            assert back[1] is None
        else:
            assert torch.equal(back[1], bias)
            assert torch.equal(rows[..., -1], bias)


def test_low_precision_becomes_float32_and_nothing_keeps_a_graph():
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]:
        assert full_precision(torch.ones(2, dtype=dtype)).dtype == expected
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert full_precision(x).dtype == torch.float64
    assert not full_precision(x).requires_grad


def test_rows_of_an_example_stay_together():
    x = torch.arange(24).reshape(6, 2, 2)
    assert torch.equal(split_rows(x, 3), x.reshape(1, 3, 4, 2))


def test_a_frozen_bias_is_no_coordinate():
    layer = nn.Linear(2, 3)
    layer.bias.requires_grad_(False)
    described = find_layers(layer, parameters=False).layers[""]
    assert described.shape == (1, 3, 2)
    assert described.inputs(torch.ones(4, 2), 4).shape == (1, 4, 1, 2)
