"""Blocks of one parameter, and modules whose weight is used without calling them, in captured passes."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional

from lightning_influence.model.forward import Forward
from lightning_influence.model.layers import DENSE_WIDTH
from lightning_influence.model.plan import find_layers

B = 5


class Net(LightningModule):
    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.head(self.body(batch[0])), batch[1])


class Text(nn.Module):
    """Embeddings, positions, a class token, attention (whose output projection nobody calls) and norms."""

    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Embedding(9, 8), nn.Parameter(torch.randn(6, 8))
        self.start = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=False)

    def forward(self, x):
        h = torch.cat([self.start.expand(len(x), -1, -1), self.embed(x) + self.positions], 1)
        return self.layer(h.transpose(0, 1))[0]


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(9, 4), nn.LSTM(4, 8, batch_first=True)

    def forward(self, x):
        return self.rnn(self.embed(x))[0][:, -1]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.embed(x))).mean(1)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


class Unseen(nn.Module):
    """A scale that no torch function is seen to use."""

    def __init__(self):
        super().__init__()
        self.embed, self.scale = nn.Embedding(9, 8), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return _Hidden.apply(self.embed(x).mean(1), self.scale)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(DENSE_WIDTH, 8)

    def forward(self, x):
        return self.embed(x).mean(1)


BODIES = {
    "text": (Text, 8),
    "recurrent": (Sequence, 8),
    "tied": (Tied, 9),
    "unseen": (Unseen, 8),
    "wide": (Wide, 8),
}


@pytest.fixture(params=BODIES)
def case(request):
    make, width = BODIES[request.param]
    model = Net(make(), nn.Linear(width, 3)).double()
    return model, (torch.randint(0, 9, (B, 6)), torch.randint(0, 3, (B,)))


def expected_gradients(model, batch):
    parameters = dict(model.named_parameters())
    rows = []
    for n in range(B):
        loss = model.training_step(tuple(part[n : n + 1] for part in batch), 0)
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
    return {
        name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)
    }


def test_all_parameters_are_covered_and_exact(case):
    model, batch = case
    plan = find_layers(model)
    assert plan.coverage == 1.0
    captured = Forward(plan)(model, batch, B)
    found = captured.loss_gradients()
    assert list(found) == list(plan.layers)
    expected = expected_gradients(model, batch)
    names = {id(p): name for name, p in model.named_parameters()}
    for name, layer in plan.layers.items():
        weight, bias = layer.to_parameters(found[name].dense()[0])
        own = layer.rule.weight(layer.module)
        torch.testing.assert_close(weight, expected[names[id(own)]], rtol=1e-8, atol=1e-10)
        if bias is not None:
            own = layer.rule.bias(layer.module)
            torch.testing.assert_close(bias, expected[names[id(own)]], rtol=1e-8, atol=1e-10)


def test_several_seeds_and_parts_agree_with_one_by_one(case):
    model, batch = case
    plan = find_layers(model)
    forward = Forward(plan)
    captured = forward(model, batch, B)
    columns = captured.curvature_gradients("exact")
    seeds = list(captured.curvature_seeds("exact"))
    for k, seed in enumerate(seeds):
        one = captured.recorder.gradients(captured.loss.outputs, [seed], B)
        for name in plan.layers:
            torch.testing.assert_close(columns[name].dense()[k], one[name].dense()[0])
    whole = forward(model, batch, B).loss_gradients()
    parts = list(forward(model, batch, B).loss_gradient_parts())
    for name in plan.layers:
        joined = torch.cat([part[name].dense() for part in parts], dim=1)
        torch.testing.assert_close(joined, whole[name].dense())


def test_what_is_not_seen_takes_the_slow_way_and_is_named():
    model = Net(Unseen(), nn.Linear(8, 3)).double()
    plan = find_layers(model)
    Forward(plan)(model, (torch.randint(0, 9, (B, 6)), torch.randint(0, 3, (B,))), B)
    assert plan.slow == {"body.scale"}


def test_a_wide_parameter_has_a_diagonal():
    layers = find_layers(Net(Wide(), nn.Linear(8, 3))).layers
    assert layers["body.embed.weight"].shape == (8 * DENSE_WIDTH, 1, 1)
    assert layers["head"].shape == (1, 3, 9)


def test_patterns_select_and_take_out():
    model = Net(Text(), nn.Linear(8, 3))
    everything = list(find_layers(model).layers)
    assert list(find_layers(model, ["head"]).layers) == ["head"]
    assert list(find_layers(model, ["body.layer.norm1"]).layers) == [
        "body.layer.norm1.weight",
        "body.layer.norm1.bias",
    ]
    assert list(find_layers(model, ["!head"]).layers) == [name for name in everything if name != "head"]
    assert list(find_layers(model, ["body.layer.*", "!*norm*"]).layers) == [
        "body.layer.self_attn.in_proj_weight", "body.layer.self_attn.in_proj_bias",
        "body.layer.self_attn.out_proj", "body.layer.linear1", "body.layer.linear2",
    ]  # fmt: skip
