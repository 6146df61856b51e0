"""Per-example gradients from uses against one backward pass for each example, family by family."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, rnn
from use_oracle import Formula, numbers, reference_gradients, squared_loss, tokens

from lightning_influence.model.uses import Product, Watch, Way, differentiate_losses, pull_gradients

B = 4


def sequential(*layers):
    return nn.Sequential(*layers).double()


class Transformer(nn.Module):
    def __init__(self, batch_first, norm_first=False, decoder=False):
        super().__init__()
        self.embed, self.batch_first = nn.Embedding(11, 8), batch_first
        self.positions, self.start = nn.Parameter(numbers(B, 8)), nn.Parameter(numbers(1, 1, 8))
        kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        layer = kind(8, 2, 12, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
        self.decoder = nn.TransformerDecoder(layer, 2) if decoder else None
        self.encoder = None if decoder else nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):  # as many tokens as examples
        h = self.embed(x) + self.positions
        h = torch.cat([self.start.expand(len(x), -1, -1), h], dim=1)
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.encoder(h) if self.encoder is not None else self.decoder(h, h * 0.5)
        h = h if self.batch_first else h.transpose(0, 1)
        return self.head(h[:, 0])


class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.first = kwargs.get("batch_first", False)
        self.attention = nn.MultiheadAttention(8, 2, **kwargs)
        self.key, self.value = nn.Linear(8, kwargs.get("kdim") or 8), nn.Linear(8, kwargs.get("vdim") or 8)

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        out, weights = self.attention(x, self.key(x), self.value(x))
        return (out if self.first else out.transpose(0, 1)) + weights.sum(dim=(1, 2))[:, None, None]


class Recurrent(nn.Module):
    def __init__(self, kind, packed=False, first=True, **kwargs):
        super().__init__()
        self.rnn = kind(5, 3, batch_first=first, **kwargs)
        self.packed, self.first = packed, first

    def forward(self, x):
        if self.packed:
            lengths = torch.tensor([3, 6, 2, 5])
            rows = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, state = self.rnn(rows)
            out = rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]
        else:
            out, state = self.rnn(x if self.first else x.transpose(0, 1))
            out = out if self.first else out.transpose(0, 1)
        state = state[0] if isinstance(state, tuple) else state
        return torch.cat([out.flatten(1), state.transpose(0, 1).flatten(1)], dim=1)


class Folded(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(x.flatten(0, 1))[0].reshape(len(x), -1)


class Tied(nn.Module):
    def __init__(self, transpose=False):
        super().__init__()
        self.table, self.transpose = nn.Parameter(numbers(11, 6)), transpose

    def forward(self, x):
        h = torch.tanh(functional.embedding(x, self.table))
        return h @ self.table.T if self.transpose else functional.linear(h, self.table)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.norm.running_mean += 0.3
        self.norm.running_var *= 1.7

    def forward(self, x):
        h = functional.relu(self.norm(self.a(x)), inplace=True)
        kept = h
        h = self.b(h)
        h += kept
        return torch.tanh_(h).mean(dim=(2, 3))


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(5, 7), nn.Parameter(numbers(2, 5)), nn.Parameter(numbers(7, 2))
        self.size = nn.Parameter(numbers(7, seed=8))
        self.base.weight.requires_grad_(False)

    def forward(self, x):
        weight = self.base.weight + 0.5 * self.b @ self.a
        weight = self.size[:, None] * weight / weight.norm(dim=1, keepdim=True)
        return functional.linear(x, weight, self.base.bias)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x))) + x @ self.layer.weight


class Loop(nn.Module):
    """Runs the examples one by one, as models of graphs do."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 3), nn.Parameter(numbers(3))

    def forward(self, x):
        return torch.stack([self.scale * self.layer(row[: 2 + at % 3]).sum(0) for at, row in enumerate(x)])


def masked(p, x):
    """Keeps some rows of each example, as masked language models do, and puts them back."""
    rows = x[x[..., 0] > -0.5]
    out = torch.zeros(*x.shape[:2], 3, dtype=x.dtype)
    out[x[..., 0] > -0.5] = torch.tanh(rows @ p.w + p.b)
    return out.sum(1)


def windows(p, x):
    """Cuts an image into windows, as Swin does, and puts them together again."""
    cut = x.view(B, 2, 2, 2, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 3)
    out = cut @ p.w + p.bias[p.index]
    return out.view(B, 2, 2, 2, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(B, 4, 4, 3)


def window_model():
    model = Formula(windows, w=(3, 3), bias=(5, 3))
    model.index = torch.tensor([0, 2, 1, 2])
    return model


def last_token(p, x):
    return (x @ p.w)[torch.arange(len(x)), torch.tensor([1, 0, 2, 1])]


def spectral():
    model = sequential(parametrizations.spectral_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 2)).double()
    return model.eval()


X, T, I = numbers(B, 5), numbers(B, 6, 5), numbers(B, 3, 8, 8)
CASES = {
    "linear": lambda: (sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), X),
    "linear, width is batch": lambda: (sequential(nn.Linear(5, B), nn.Tanh(), nn.Linear(B, B)), X),
    "linear, tokens": lambda: (sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), T),
    "linear, as many tokens as examples": lambda: (sequential(nn.Linear(5, B)), numbers(B, B, 5)),
    "addmm": lambda: (Formula(lambda p, x: torch.addmm(p.b, x, p.w), w=(5, 3), b=(3,)), X),
    "addmm, factors": lambda: (
        Formula(lambda p, x: torch.addmm(p.b, x, p.w, beta=0.5, alpha=2), w=(5, 3), b=(1, 3)), X,
    ),
    "matmul, both sides": lambda: (Formula(lambda p, x: p.a @ torch.tanh(x @ p.w), w=(5, 3), a=(2, 6)), T),
    "matmul, transposed": lambda: (Formula(lambda p, x: torch.tanh(x @ p.w.T) @ p.w, w=(3, 5)), T),
    "matmul, vector": lambda: (Formula(lambda p, x: torch.tanh(x @ p.w)[:, None], w=(5,)), X),
    "matmul, experts": lambda: (
        Formula(lambda p, x: torch.tanh(x[:, None].expand(-1, 2, -1, -1) @ p.w), w=(2, 5, 3)), T,
    ),
    "bmm, experts": lambda: (
        Formula(
            lambda p, x: torch.bmm(x.reshape(-1, 5).expand(2, -1, -1), p.w).view(2, B, 6, 3).movedim(1, 0),
            w=(2, 5, 3),
        ), T,
    ),
    "einsum": lambda: (Formula(lambda p, x: torch.einsum("bti,oi->bto", x, p.w), w=(3, 5)), T),
    "einsum, heads": lambda: (Formula(lambda p, x: torch.einsum("bti,hio->bhto", x, p.w), w=(2, 5, 3)), T),
    "einsum, groups": lambda: (Formula(lambda p, x: torch.einsum("tio,bti->bot", p.w, x), w=(6, 5, 3)), T),
    "einsum, general": lambda: (Formula(lambda p, x: torch.einsum("bi,ij,jk->bk", x, p.w, p.w), w=(5, 5)), X),
    "bilinear": lambda: (Formula(
        lambda p, x: functional.bilinear(x, torch.tanh(x), p.w, p.b), w=(3, 5, 5), b=(3,)), T),
    "conv1d": lambda: (sequential(nn.Conv1d(6, 4, 3, stride=2, padding=2, dilation=2, groups=2)), T),
    "conv2d": lambda: (sequential(nn.Conv2d(3, 6, 3, padding="same", groups=3, padding_mode="reflect")), I),
    "conv2d, channels are batch": lambda: (sequential(nn.Conv2d(3, B, 3), nn.Tanh(), nn.Conv2d(B, B, 3)), I),
    "conv3d": lambda: (sequential(nn.Conv3d(2, 3, 2, stride=2, bias=False)), numbers(B, 2, 4, 4, 4)),
    "transposed conv1d": lambda: (sequential(nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, groups=2)), T),
    "transposed conv2d": lambda: (
        sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1, padding=1, dilation=2)), I,
    ),
    "transposed conv3d": lambda: (sequential(nn.ConvTranspose3d(2, 3, 2, stride=2)), numbers(B, 2, 3, 2, 2)),
    "embedding": lambda: (sequential(nn.Embedding(11, 3, padding_idx=2), nn.Linear(3, 2)), tokens(B, 6)),
    "bag": lambda: (sequential(nn.EmbeddingBag(11, 3, mode="mean", padding_idx=1)), tokens(B, 6)),
    "bag, most": lambda: (sequential(nn.EmbeddingBag(11, 3, mode="max")), tokens(B, 6)),
    "bag, ragged": lambda: (
        Formula(
            lambda p, x: functional.embedding_bag(
                x[torch.arange(6) < torch.tensor([2, 6, 1, 4])[:, None]], p.w, torch.tensor([0, 2, 8, 9]),
                mode="mean"), w=(11, 3),
        ), tokens(B, 6),
    ),
    "layer norm": lambda: (sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.LayerNorm((6, 6))), T),
    "norms": lambda: (
        sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.PReLU(4),
            nn.InstanceNorm2d(4, affine=True), nn.PReLU(),
        ).eval(), I,
    ),
    "rms norm": lambda: (sequential(nn.RMSNorm(5), nn.Linear(5, 2)), T),
    "scale and shift": lambda: (
        Formula(lambda p, x: 2 * (x * p.s - p.t) / p.u + torch.sub(1.0, x * p.one), s=(5,), t=(6, 1), u=(1,),
                one=()), T,
    ),
    "table as long as the batch": lambda: (Formula(lambda p, x: x + p.w, w=(B, 5)), numbers(B, B, 5)),
    "time first": lambda: (
        Formula(lambda p, x: ((x.transpose(0, 1) + p.w[:, None]) @ p.v).transpose(0, 1), w=(B, 5), v=(5, 5)),
        numbers(B, B, 5),
    ),
    "rows, examples last": lambda: (
        Formula(lambda p, x: (x.transpose(0, 1).reshape(-1, 5) @ p.w).view(6, B, 3).mT.movedim(-1, 0),
                w=(5, 3)), T,
    ),
    "class token": lambda: (
        Formula(lambda p, x: torch.cat([p.w.repeat(len(x), 1, 1), x], 1) @ p.v, w=(1, 1, 5), v=(5, 2)), T,
    ),
    "table looked up without the batch": lambda: (
        Formula(
            lambda p, x: x + functional.embedding(torch.zeros(6, dtype=torch.long).expand(B, 6), p.w),
            w=(2, 5),
        ), T,
    ),
    "first state": lambda: (
        Formula(lambda p, x: torch.tanh(x.sum(1) + torch.zeros(len(x), 5, dtype=x.dtype) @ p.w + p.b),
                w=(5, 5), b=(5,)), T,
    ),
    "weight norm": lambda: (
        sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 2)), X,
    ),
    "spectral norm": lambda: (spectral(), X),
    "adapters": lambda: (Lora().double(), T),
    "tied": lambda: (Tied(), tokens(B, 6)),
    "tied, transposed": lambda: (Tied(transpose=True), tokens(B, 6)),
    "twice": lambda: (Twice().double(), T),
    "in place": lambda: (Residual().double().eval(), I),
    "scaled in place": lambda: (
        Formula(lambda p, x: torch.tanh(x * 1.0).mul_(p.s).add_(p.t).clone().mul_(2), s=(5,), t=(5,)), T),
    "written in place": lambda: (
        Formula(lambda p, x: torch.cat([write(x, p.w), x]).view(2, B, 6, 5).sum(0), w=(5,)), T,
    ),
    "mask": lambda: (Formula(masked, w=(5, 3), b=(3,)), T),
    "windows": lambda: (window_model(), numbers(B, 4, 4, 3)),
    "picked": lambda: (Formula(last_token, w=(5, 3)), T),
    "order changed and back": lambda: (
        Formula(lambda p, x: (x.flip(0)[[1, 0, 3, 2]] @ p.w)[[1, 0, 3, 2]].flip(0), w=(5, 3)), T,
    ),
    "views folded": lambda: (
        Formula(lambda p, x: (x.repeat_interleave(3, 0) @ p.w).view(B, 3, 6, 2).sum(1), w=(5, 2)), T,
    ),
    "views behind": lambda: (
        Formula(lambda p, x: sum((torch.cat([x, -x]) @ p.w).tanh().chunk(2)), w=(5, 2)), T,
    ),
    "one by one": lambda: (Loop().double(), T),
    "where": lambda: (Formula(lambda p, x: torch.where(x > 0, x, p.w).cumsum(-1), w=(5,)), T),
    **{
        f"{kind.__name__}{', packed' if packed else ''}{'' if first else ', time first'}": (
            lambda kind=kind, packed=packed, first=first: (
                Recurrent(kind, packed, first, num_layers=2, bidirectional=True).double(), T)
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for packed, first in ((False, True), (True, True), (False, False))
    },
    **{
        f"{kind.__name__} {kwargs}{', packed' if packed else ''}": (
            lambda kind=kind, packed=packed, kwargs=kwargs: (Recurrent(kind, packed, **kwargs).double(), T))
        for kind, packed, kwargs in (
            (nn.GRU, True, {"bias": False}), (nn.LSTM, False, {"bias": False, "bidirectional": True}),
            (nn.RNN, True, {"nonlinearity": "relu"}), (nn.LSTM, True, {"proj_size": 2, "num_layers": 2}),
        )
    },
    "several sequences an example": lambda: (Folded().double(), numbers(B, 2, 6, 5)),
    "LSTM cell": lambda: (Formula(
        lambda p, x: torch.lstm_cell(x, (x[:, :3], x[:, 1:4]), p.w, p.u, p.a, p.b)[0], w=(12, 5), u=(12, 3),
        a=(12,), b=(12,)), X),
    **{
        f"attention {kwargs}": (lambda kwargs=kwargs: (Attention(**kwargs).double(), numbers(B, B, 8)))
        for kwargs in (
            {}, {"batch_first": True}, {"kdim": 6, "vdim": 4}, {"bias": False, "add_bias_kv": True},
        )
    },
    **{
        f"transformer {kwargs}": (lambda kwargs=kwargs: (Transformer(**kwargs).double().eval(), tokens(B, B)))
        for kwargs in (
            {"batch_first": True}, {"batch_first": False}, {"batch_first": True, "norm_first": True},
            {"batch_first": False, "decoder": True},
        )
    },
}  # fmt: skip


def write(x, w):
    x = x.clone()
    x[:, 0] = w
    return x


def differentiate(model, batch, count=B):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with Watch(parameters, batch, count) as watch:
        losses = squared_loss(model, batch)
    return watch, losses


def make_case(name):
    torch.manual_seed(5)
    model, x = CASES[name]()
    return model, (x, torch.linspace(0, 1, len(x), dtype=torch.float64))


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return make_case(request.param)


# The others are written for their number of examples.
ANY_NUMBER = [
    name for name in CASES if type(make_case(name)[0]).__name__ not in {"Recurrent", "Transformer", "Formula"}
]


def assert_same(found, expected):
    scale = max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        if name not in found:
            assert grad.norm() <= 1e-12 * scale, name
            continue
        torch.testing.assert_close(
            found[name].dense()[0], grad, rtol=1e-9, atol=1e-9 * float(scale), msg=name
        )


def test_closed_forms_are_exact(case):
    model, batch = case
    watch, losses = differentiate(model, batch)
    found = differentiate_losses(watch, losses)
    assert {report.way for report in found.report.parameters.values()} <= {Way.USES, Way.UNUSED}
    assert_same(found.gradients, reference_gradients(model, batch, squared_loss))


def test_differentiated_operations_are_exact(case):
    model, batch = case
    watch, losses = differentiate(model, batch)
    found = pull_gradients(watch, losses.sum(), [None], closed_forms=False)
    expected = reference_gradients(model, batch, squared_loss)
    kept = {name: grad for name, grad in expected.items() if name not in found.failed}
    if kept:
        assert_same(found.gradients, kept)
    else:  # bags that are one call for all examples have a closed form alone
        assert isinstance(model, Formula)
        assert found.failed


@pytest.mark.parametrize("name", ANY_NUMBER)
def test_a_single_example_is_its_gradient(name):
    model, batch = make_case(name)
    one = tuple(part[:1] for part in batch)
    watch, losses = differentiate(model, one, 1)
    assert_same(
        pull_gradients(watch, losses.sum(), [None]).gradients, reference_gradients(model, one, squared_loss)
    )


def test_seeds_share_a_forward_pass(case):
    model, batch = case
    watch, losses = differentiate(model, batch)
    seeds = [torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64), torch.zeros(B, dtype=torch.float64)]
    seeds[1][2] = 1.0
    found = pull_gradients(watch, losses, seeds).gradients
    for name, grad in reference_gradients(model, batch, squared_loss).items():
        if name in found:
            dense = found[name].dense()
            expected = torch.stack([torch.einsum("b,b...->b...", seed, grad) for seed in seeds])
            torch.testing.assert_close(dense, expected, rtol=1e-9, atol=1e-9 * float(grad.norm() + 1))
            product = found[name].product()
            if product is not None:
                torch.testing.assert_close(product.dense(), dense)
            weights = torch.linspace(-1, 2, 2 * B, dtype=torch.float64).view(2, B)
            expected = torch.einsum("kb,kb...->...", weights, dense)
            torch.testing.assert_close(found[name].combine(weights), expected)
            assert expected.norm() <= found[name].bound(weights) * (1 + 1e-12)


def test_watching_changes_no_number_and_leaves_nothing_behind(case):
    model, batch = case
    plain = squared_loss(model, batch)
    state = torch.get_rng_state()
    watch, losses = differentiate(model, batch)
    found = differentiate_losses(watch, losses)
    assert torch.equal(losses, plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.gradients
    assert all(p.grad is None and not vars(p).keys() - {"_is_param"} for p in model.parameters())
    losses.sum().backward()  # the graph is the user's own, still


@pytest.mark.parametrize(
    "name",
    [
        "linear, tokens",
        "conv2d",
        "transformer {'batch_first': True}",
        "LSTM",
        "GRU, packed",
        "RNN, time first",
    ],
)
def test_weights_of_linear_maps_keep_their_factors(name):
    model, x = CASES[name]()
    watch, losses = differentiate(model, (x, torch.zeros(B, dtype=torch.float64)))
    found = pull_gradients(watch, losses.sum(), [None]).gradients
    weights = [key for key, grad in found.items() if len(grad.shape) > 1 and "embed" not in key]
    weights = [key for key in weights if key not in ("positions", "start")]
    assert weights
    assert all(isinstance(found[key].product(), Product) for key in weights)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_tied_table_is_one_product_where_that_is_smaller(seeds):
    model, x = Tied(), tokens(B, 3, high=40)
    model.table = nn.Parameter(numbers(40, 30) / 30)
    watch, losses = differentiate(model, (x, torch.zeros(B, dtype=torch.float64)))
    weights = torch.linspace(-1, 2, seeds * B, dtype=torch.float64).view(seeds, B)
    table = pull_gradients(watch, losses, list(weights)).gradients["table"]
    product = table.product()
    assert product is not None
    assert product.inputs.shape[2] == 3 + 3 * seeds  # positions of the head, and of the look-up for each seed
    expected = reference_gradients(model, (x, torch.zeros(B, dtype=torch.float64)), squared_loss)["table"]
    torch.testing.assert_close(product.dense(), weights[:, :, None, None] * expected)
