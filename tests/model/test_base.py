import pytest
import torch
from lightning.pytorch import LightningModule
from models import CASES
from torch import nn
from torch.nn import functional

from lightning_influence import InfluenceModule
from lightning_influence.model.layers.layer import full_precision, split_rows
from lightning_influence.model.layers.plan import find_layers


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


def test_a_rule_for_a_class_by_its_name_and_a_weight_with_outputs_in_columns():
    """A stand-in for the layer of GPT-2: the same gradients and factors as the linear layer's, transposed."""

    class Conv1D(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = nn.Parameter(linear.weight.detach().T.clone())
            self.bias = nn.Parameter(linear.bias.detach().clone())

        def forward(self, x):
            return (torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)).view(*x.shape[:-1], -1)

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    linear = nn.Linear(3, 5).double()
    [layer] = find_layers(nn.Sequential(Conv1D(linear))).layers.values()
    [other] = find_layers(nn.Sequential(linear)).layers.values()
    assert layer.shape == other.shape == (1, 5, 4)
    matrix = layer.from_parameters(layer.module.weight, layer.module.bias)
    assert torch.equal(matrix, other.from_parameters(linear.weight, linear.bias))
    weight, bias = layer.to_parameters(matrix[None])
    assert torch.equal(weight[0], layer.module.weight)
    assert torch.equal(bias[0], layer.module.bias)


@pytest.mark.parametrize("method", ["identity", "ekfac", "block_ggn", "auto"])
def test_scores_of_a_transposed_layer_are_those_of_the_linear_one(method):
    class Conv1D(nn.Module):
        def __init__(self, width, out):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(width, out)), nn.Parameter(torch.zeros(out))

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"

    class Net(LightningModule):
        def __init__(self, make):
            super().__init__()
            self.first, self.head = make(4, 6), make(6, 3)

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.head(torch.tanh(self.first(batch[0]))).mean(1), batch[1])

    plain, turned = Net(nn.Linear).double(), Net(Conv1D).double()
    turned.load_state_dict({
        key: value.T if key.endswith("weight") else value for key, value in plain.state_dict().items()
    })
    batches = [(torch.randn(5, 2, 4).double(), torch.arange(5) % 3) for _ in range(2)]
    found = InfluenceModule(turned).scores(batches, batches, method=method, damping=0.1)
    expected = InfluenceModule(plain).scores(batches, batches, method=method, damping=0.1)
    assert list(found.diagnostics.layers) == ["first", "head"]
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-8, atol=1e-11)
