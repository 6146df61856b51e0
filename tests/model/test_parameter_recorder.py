"""Blocks of one parameter, and modules whose weight is used without calling them, in captured passes."""

import itertools

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional

from lightning_influence.curvature.factors import LayerStatistics
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients
from lightning_influence.model.layers.layer import LOOKUP_WIDTH, MATRIX_WIDTH
from lightning_influence.model.layers.parameter_recorder import ParameterRecorder
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.layers.recorder import Recorder

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
        self.embed = nn.Embedding(1 + MATRIX_WIDTH, 8)

    def forward(self, x):
        return self.embed(x).mean(1)


class Mapped(nn.Module):
    """A bare matrix that maps by a function, twice, and one that maps from the left."""

    def __init__(self):
        super().__init__()
        self.embed, self.w = nn.Embedding(9, 8), nn.Parameter(torch.randn(8, 8) / 3)
        self.left = nn.Parameter(torch.randn(8, 6) / 3)

    def forward(self, x):
        h = functional.linear(torch.tanh(functional.linear(self.embed(x), self.w)), self.w)
        return (self.left @ h).sum(1)


class Again(nn.Module):
    """A layer that is called, and whose weight a function takes a second and a third time."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = torch.tanh(functional.linear(self.embed(x).mean(1), self.layer.weight))
        return functional.linear(torch.tanh(self.layer(h)), self.layer.weight, self.layer.bias)


class Combined(nn.Module):
    """Layers that nobody calls: their weights are multiplied with each other, or scaled, before they map."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(9, 8), nn.Linear(8, 5), nn.Linear(5, 8)
        self.scaled = nn.Conv1d(8, 8, 3, groups=2)

    def forward(self, x):
        h = functional.linear(self.embed(x), self.second.weight @ self.first.weight, self.second.bias)
        weight = self.scaled.weight / self.scaled.weight.norm()
        return (
            functional.conv1d(h.transpose(1, 2), weight, self.scaled.bias, groups=2).mean(2)
            + self.first.bias.sum()
        )


BODIES = {
    "combined": (Combined, 8),
    "again": (Again, 8),
    "text": (Text, 8),
    "recurrent": (Sequence, 8),
    "tied": (Tied, 9),
    "unseen": (Unseen, 8),
    "wide": (Wide, 8),
    "mapped": (Mapped, 8),
}


@pytest.fixture(params=["vectors", "matrices", "diagonals"])
def form(request, monkeypatch):
    if request.param != "vectors":
        monkeypatch.setattr("lightning_influence.model.layers.layer.DENSE_WIDTH", 10)
    if request.param == "diagonals":
        monkeypatch.setattr("lightning_influence.model.layers.layer.MATRIX_WIDTH", 7)


@pytest.fixture(params=BODIES)
def case(request, form):
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


def test_rows_of_a_parameter_that_are_written_into_a_part():
    """Each category has a vector of its own, of which some entries are those of its column."""

    class Column(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.common = nn.Embedding(5, 8), nn.Parameter(torch.randn(1, 4))

        def training_step(self, batch, batch_idx):
            words = self.own(batch[0])
            words[:, :4] = self.common.expand(len(words), -1)
            return functional.cross_entropy(words.tanh(), batch[1])

    module, count = Column().double(), 6
    batch = torch.arange(count) % 5, torch.arange(count) % 8
    plan = find_layers(module)
    found = Forward(plan)(module, batch, count).loss_gradients()["common"].dense()[0].reshape(count, 1, 4)
    alone = [module.training_step((batch[0][n : n + 1], batch[1][n : n + 1]), 0) for n in range(count)]
    expected = torch.stack([torch.autograd.grad(loss, module.common)[0] for loss in alone])
    torch.testing.assert_close(found, expected)
    assert not plan.slow


def test_numbers_that_are_groups_of_their_own_are_no_products():
    """Curvature products with several seeds of a packed layer would be as many products of two numbers."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, MATRIX_WIDTH // 2, 3))

        def forward(self, x):
            return functional.conv1d(x[..., None], self.weight.flatten(0, 1)[..., None], groups=2)[..., 0]

    model = Net(Packed(), nn.Linear(2 * (MATRIX_WIDTH // 2), 3)).double()
    batch = torch.randn(B, 6, dtype=torch.float64), torch.arange(B) % 3
    plan = find_layers(model)
    assert plan.layers["body.weight"].shape == (model.body.weight.numel(), 1, 1)
    captured = Forward(plan)(model, batch, B)
    seeds = [torch.eye(3, dtype=torch.float64)[[k] * B] for k in range(3)]
    found = captured.recorder.gradients(captured.loss.outputs, seeds, B)["body.weight"]
    assert isinstance(found, DenseGradients)
    outputs = model.head(model.body(batch[0]))
    for k, n in itertools.product(range(3), range(B)):
        (expected,) = torch.autograd.grad(outputs[n, k], model.body.weight, retain_graph=True)
        torch.testing.assert_close(found.dense()[k, n].flatten(), expected.flatten())


def test_what_is_not_seen_takes_the_slow_way_and_is_named():
    model = Net(Unseen(), nn.Linear(8, 3)).double()
    plan = find_layers(model)
    Forward(plan)(model, (torch.randint(0, 9, (B, 6)), torch.randint(0, 3, (B,))), B)
    assert plan.slow == {"body.scale"}


def test_a_wide_parameter_is_a_table_or_has_a_diagonal():
    model = Net(Wide(), nn.Linear(8, 3))
    model.body.bare = nn.Parameter(torch.zeros(1 + MATRIX_WIDTH))
    model.body.lying = nn.Parameter(torch.zeros(8, 1 + MATRIX_WIDTH))
    layers = find_layers(model).layers
    for name in ("embed.weight", "lying"):
        layer = layers[f"body.{name}"]
        assert layer.shape == (1, 1 + MATRIX_WIDTH, 8)
        assert layer.diagonal_sides == (True, False)
        weight = torch.randn_like(layer.rule.weight(layer.module))
        assert torch.equal(layer.to_parameters(layer.from_parameters(weight, None))[0], weight)
    assert layers["body.bare"].shape == (1 + MATRIX_WIDTH, 1, 1)
    assert layers["head"].shape == (1, 3, 9)
    assert layers["head"].diagonal_sides == (False, False)


def test_an_embedding_is_a_table_from_fewer_rows_on_than_another_matrix():
    model = Net(Wide(), nn.Linear(8, 3))
    model.body.many, model.body.few = nn.Embedding(LOOKUP_WIDTH + 1, 4), nn.Embedding(LOOKUP_WIDTH, 4)
    model.body.broad = nn.Embedding(9, LOOKUP_WIDTH + 1)  # what is looked up is wide, not what is chosen of
    model.body.bag = nn.EmbeddingBag(LOOKUP_WIDTH + 1, 4)
    model.body.bare = nn.Parameter(torch.zeros(LOOKUP_WIDTH + 1, 4))
    layers = find_layers(model).layers
    tables = {name for name, layer in layers.items() if layer.is_table}
    assert tables == {"body.embed.weight", "body.many.weight", "body.bag.weight"}
    assert layers["body.many.weight"].diagonal_sides == (True, False)
    for name in ("few.weight", "broad.weight", "bare"):
        assert layers[f"body.{name}"].diagonal_sides == (False, False)
    assert layers["body.broad.weight"].shape == (1, 9, LOOKUP_WIDTH + 1)


def test_inputs_are_read_once_and_only_of_what_may_have_some(monkeypatch):
    """A model whose own parameters are vectors has nothing to read, one with an embedding once a forward."""
    pulls, pull = [], ParameterRecorder._pull_zeros
    monkeypatch.setattr(ParameterRecorder, "_pull_zeros", lambda *own: pulls.append(own) or pull(*own))
    norms = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    words = nn.Sequential(nn.Embedding(300, 8), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3))
    for net, x, most in ((norms, torch.randn(B, 8), 0), (words, torch.randint(0, 300, (B, 2)), 1)):
        layers = find_layers(net).layers
        with Recorder(layers, ParameterRecorder(layers, (x,), B, set(), set())) as recorder:
            outputs = net(x)
        for _ in range(2):
            gradients = recorder.gradients(outputs, [torch.ones_like(outputs)], B)
        recorder.inputs(B)
        assert gradients.keys() == layers.keys()
        assert len(pulls) <= most


def curvature_statistics(model, batch, name):
    captured = Forward(find_layers(model))(model, batch, B)
    gradients = captured.curvature_gradients("exact")[name]
    layer = find_layers(model).layers[name]
    statistics = LayerStatistics.zeros(layer.shape, dtype=torch.float64)
    statistics.add_covariances(gradients)
    return gradients, statistics


def test_a_matrix_that_maps_has_the_factors_of_a_linear_layer(monkeypatch):
    monkeypatch.setattr("lightning_influence.model.layers.layer.DENSE_WIDTH", 10)

    class Bare(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.w = nn.Parameter(layer.weight.detach().clone())

        def forward(self, x):
            return functional.linear(x, self.w)

    linear, head = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
    batch = (torch.randn(B, 4, 6).double(), torch.randint(0, 3, (B, 4)))

    class Tokens(Net):
        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.head(self.body(batch[0])).flatten(0, 1), batch[1].flatten())

    known, expected = curvature_statistics(Tokens(linear, head).double(), batch, "body")
    gradients, found = curvature_statistics(Tokens(Bare(linear), head).double(), batch, "body.w")
    assert isinstance(gradients, FactoredGradients)
    torch.testing.assert_close(gradients.dense(), known.dense())
    torch.testing.assert_close(found.covariance_in(), expected.covariance_in())
    torch.testing.assert_close(found.covariance_out(), expected.covariance_out())


def test_another_matrix_has_the_moments_of_its_rows_and_columns(monkeypatch):
    monkeypatch.setattr("lightning_influence.model.layers.layer.DENSE_WIDTH", 10)
    body = Sequence()
    # Where steps are not taken again, each example is differentiated by itself.
    monkeypatch.setattr("lightning_influence.model.uses.operations.recurrent._read", lambda *args: None)
    body.rnn = nn.LSTM(4, 9, batch_first=True, proj_size=8)
    model = Net(body, nn.Linear(8, 3)).double()
    batch = (torch.randint(0, 9, (B, 6)), torch.randint(0, 3, (B,)))
    gradients, found = curvature_statistics(model, batch, "body.rnn.weight_ih_l0")
    assert isinstance(gradients, DenseGradients)
    flat = gradients.dense()[:, :, 0].flatten(0, 1)
    rows = torch.einsum("nij,nkj->ik", flat, flat)
    columns = torch.einsum("nij,nik->jk", flat, flat)
    total = flat.square().sum()
    torch.testing.assert_close(found.covariance_out()[0], rows / B)
    torch.testing.assert_close(found.covariance_in()[0], columns / total)
    # Their product has the trace of the block of the Gauss-Newton matrix.
    trace = found.covariance_out()[0].trace() * found.covariance_in()[0].trace()
    torch.testing.assert_close(trace, total / B)
    first = gradients.select(slice(0, 2)).scaled(2.0).seeds(slice(0, 1))
    torch.testing.assert_close(first.dense(), 2 * gradients.dense()[:1, :2])
    vectors = torch.randn(3, 1, 36, 4, dtype=torch.float64)
    products = torch.einsum("kbgoi,vgoi->kbv", gradients.dense(), vectors)
    torch.testing.assert_close(gradients.dot(vectors), products)
    expected = torch.einsum("kbv,kbgoi->vgoi", products, gradients.dense())
    torch.testing.assert_close(gradients.combine(products), expected)


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
