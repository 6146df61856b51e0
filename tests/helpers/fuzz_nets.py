"""Random small networks in float64: each maps one tensor to outputs `(B, C)`, `(B, T, C)` or two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

EXAMPLES_FIRST = 3  # size of the last dimension of vectors and of sequences' elements
STEPS = 4  # of a sequence
WORDS = 7

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class Shape:
    """Sizes and parts that the networks have in common."""

    hidden: int
    outputs: int
    bias: bool
    act: str
    norm: str
    dropout: bool
    zero_head: bool = False

    def activation(self) -> nn.Module:
        return ACTIVATIONS[self.act]()


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(EXAMPLES_FIRST, s.hidden), nn.Linear(s.hidden, s.hidden, s.bias)
        self.head = nn.Linear(s.hidden, s.outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(h)))))


class Skip(nn.Module):
    """Two paths to the outputs, so that two layers are the last ones."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.wide, self.deep = (
            nn.Linear(EXAMPLES_FIRST, s.outputs, s.bias),
            nn.Linear(EXAMPLES_FIRST, s.hidden),
        )
        self.head = nn.Linear(s.hidden, s.outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.head(torch.tanh(self.deep(x)))


class Heads(nn.Module):
    """One trunk, two heads."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.trunk = nn.Linear(EXAMPLES_FIRST, s.hidden, s.bias)
        self.left, self.right = nn.Linear(s.hidden, s.outputs), nn.Linear(s.hidden, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.left(h), self.right(h)


class Attention(nn.Module):
    """One head out of three Linear layers."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(EXAMPLES_FIRST, s.hidden, s.bias) for _ in range(3))
        self.head = nn.Linear(s.hidden, s.outputs)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.head(torch.softmax(q @ k.mT, -1) @ v)


class Multihead(nn.Module):
    """torch's own attention."""

    def __init__(self, s: Shape, batch_first: bool = True) -> None:
        super().__init__()
        width = 2 * (s.hidden // 2 + 1)
        self.inner, self.first = nn.Linear(EXAMPLES_FIRST, width), batch_first
        self.attention = nn.MultiheadAttention(width, 2, batch_first=batch_first, bias=s.bias)
        self.head = nn.Linear(width, s.outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x) if self.first else self.inner(x).transpose(0, 1)
        h = self.attention(h, h, h, need_weights=False)[0]
        return self.head(h if self.first else h.transpose(0, 1))


class Recurrent(nn.Module):
    """An LSTM or GRU, batch first or time first inside, with an output at every step or at the last one."""

    def __init__(self, s: Shape, kind: type[nn.RNNBase], batch_first: bool, last: bool) -> None:
        super().__init__()
        self.cell = kind(EXAMPLES_FIRST, s.hidden, batch_first=batch_first, bias=s.bias)
        self.head, self.first, self.last = nn.Linear(s.hidden, s.outputs), batch_first, last

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x if self.first else x.transpose(0, 1))[0]
        h = h if self.first else h.transpose(0, 1)
        return self.head(h[:, -1] if self.last else h)


class Projected(nn.Module):
    """An LSTM whose states are projected."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.lstm = nn.LSTM(EXAMPLES_FIRST, s.hidden + 1, proj_size=s.hidden, batch_first=True, bias=s.bias)
        self.head = nn.Linear(s.hidden, s.outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Loop(nn.Module):
    """A cell that is called step by step, and an output at each step or at the last one."""

    def __init__(self, s: Shape, kind: type[nn.RNNCellBase], last: bool) -> None:
        super().__init__()
        self.cell = kind(EXAMPLES_FIRST, s.hidden, bias=s.bias)  # type: ignore[call-arg]
        self.head, self.last = nn.Linear(s.hidden, s.outputs), last

    def forward(self, x: Tensor) -> Tensor:
        state, hidden = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            hidden.append(state[0] if isinstance(state, tuple) else state)
        return self.head(hidden[-1] if self.last else torch.stack(hidden, dim=1))


class Places(nn.Module):
    """A token of its own before the steps and a table of places added to them, as in a ViT."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.inner = nn.Linear(EXAMPLES_FIRST, s.hidden, s.bias)
        self.token = nn.Parameter(torch.zeros(1, 1, s.hidden))
        self.places = nn.Parameter(torch.zeros(1, STEPS + 1, s.hidden))
        self.mix, self.head = nn.Linear(s.hidden, s.hidden), nn.Linear(s.hidden, s.outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.inner(x)], dim=1) + self.places
        return self.head(torch.tanh(self.mix(h)).mean(1) + h[:, 0])


class Forms(nn.Module):
    """A bilinear form, and a product that einsum writes."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.form = nn.Bilinear(EXAMPLES_FIRST, EXAMPLES_FIRST, s.hidden, bias=s.bias)
        self.weight = nn.Parameter(torch.randn(s.outputs, s.hidden))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...h,oh->...o", torch.tanh(self.form(x, x.flip(-1))), self.weight)


class TimeFirstInside(nn.Module):
    """Linear layers on `(T, B, D)`, and outputs that are turned back."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(EXAMPLES_FIRST, s.hidden, s.bias), nn.Linear(s.hidden, s.outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.transpose(0, 1)))).transpose(0, 1)


class Tied(nn.Module):
    """The table of words is the matrix of the last layer, too."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, s.hidden)
        self.body, self.head = nn.Linear(s.hidden, s.hidden, s.bias), nn.Linear(s.hidden, WORDS, False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(x))))


class Scaled(nn.Module):
    """Parameters of the network's own beside its layers: a scale and prototypes, which have no batch."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.body, self.scale = (
            nn.Linear(EXAMPLES_FIRST, s.hidden, s.bias),
            nn.Parameter(torch.ones(s.hidden)),
        )
        self.prototypes = nn.Parameter(torch.randn(s.outputs, s.hidden))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x)) * self.scale
        return -(h[:, None] - self.prototypes).square().sum(-1)


class Functional(nn.Module):
    """Layers that are used by functions, not called; one of them is called as well."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.first = nn.Linear(EXAMPLES_FIRST, s.hidden, s.bias)
        self.head = nn.Linear(s.hidden, s.outputs, s.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias))
        return self.head(h) + nn.functional.linear(h.square(), self.head.weight)


class Experts(nn.Module):
    """Each row goes to one of two experts, which may have none."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(EXAMPLES_FIRST, s.hidden, s.bias) for _ in range(2))
        self.head, self.by_index = nn.Linear(s.hidden, s.outputs), s.dropout

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(*x.shape[:-1], self.head.in_features)
        for number, expert in enumerate(self.experts):
            chosen = (x[..., 0] > 0) == bool(number)
            rows = torch.where(chosen) if self.by_index else chosen
            h[rows] = torch.tanh(expert(x[rows]))
        return self.head(h)


def _bag(s: Shape) -> nn.Module:
    return nn.Sequential(
        nn.EmbeddingBag(WORDS, s.hidden, mode="sum" if s.bias else "mean"),
        s.activation(),
        nn.Linear(s.hidden, s.outputs),
    )


def _norm(s: Shape) -> list[nn.Module]:
    return {"batch": [nn.BatchNorm1d(s.hidden)], "layer": [nn.LayerNorm(s.hidden)]}.get(s.norm, [])


def _mlp(s: Shape, depth: int) -> nn.Module:
    layers, width = [], EXAMPLES_FIRST
    for _ in range(depth):
        block = [nn.Linear(width, s.hidden, s.bias), *_norm(s), s.activation()]
        block += [nn.Dropout(0.5)] if s.dropout else []
        layers += [Residual(nn.Sequential(*block))] if width == s.hidden and s.norm == "layer" else block
        width = s.hidden
    return nn.Sequential(*layers, nn.Linear(width, s.outputs))


def _conv(s: Shape, dims: int, groups: int, stride: int, padding: str, norm: str) -> nn.Module:
    kinds = {
        1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
        2: (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
    }
    conv, batch_norm, pool = kinds[dims]
    channels = 2 * (1 + s.hidden // 3)
    mode = {} if padding in {"same", "valid"} else {"padding_mode": padding}
    amount: Any = padding if padding in {"same", "valid"} else 1
    stride = 1 if padding == "same" else stride
    norms = {
        "batch": [batch_norm(channels)],
        "group": [nn.GroupNorm(2, channels)],
        "layer": [nn.GroupNorm(1, channels)],
        "none": [],
    }[norm]
    return nn.Sequential(
        conv(2, channels, 3, stride=stride, padding=amount, groups=groups, bias=s.bias, **mode),
        *norms,
        s.activation(),
        conv(channels, 2 * groups, 2, groups=groups),
        pool(2),
        nn.Flatten(),
        nn.Linear(2 * groups * 2**dims, s.outputs),
    )


def _transposed(s: Shape) -> nn.Module:
    channels = 2 * (1 + s.hidden // 3)
    up = nn.ConvTranspose1d(2, channels, 3, stride=2, padding=1, groups=2, bias=s.bias)
    return nn.Sequential(
        up, s.activation(), nn.Conv1d(channels, 3, 2), nn.Flatten(), nn.Linear(3 * 12, s.outputs)
    )


def _normed(s: Shape) -> nn.Module:
    first, last = nn.Linear(EXAMPLES_FIRST, s.hidden, s.bias), nn.Linear(s.hidden, s.outputs)
    return nn.Sequential(weight_norm(first), s.activation(), weight_norm(last))


def _encoder(s: Shape) -> nn.Module:
    width = 2 * (s.hidden // 2 + 1)
    block = nn.TransformerEncoderLayer(width, 2, 5, dropout=0.2, batch_first=True, norm_first=s.bias)
    return nn.Sequential(nn.Linear(EXAMPLES_FIRST, width), block, nn.Linear(width, s.outputs))


def _words(s: Shape) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(WORDS, s.hidden),
        nn.Linear(s.hidden, s.hidden, s.bias),
        s.activation(),
        nn.Linear(s.hidden, s.outputs),
    )


def _words_mean(s: Shape) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(WORDS, s.hidden),
        Apply(lambda h: h.mean(1)),
        nn.Linear(s.hidden, s.hidden),
        nn.Tanh(),
        nn.Linear(s.hidden, s.outputs),
    )


def _mixing(s: Shape) -> nn.Module:
    return nn.Sequential(
        nn.Linear(EXAMPLES_FIRST, s.hidden, s.bias),
        s.activation(),
        Apply(lambda h: h + torch.sin(h.mean(1, keepdim=True))),
        nn.Linear(s.hidden, s.outputs),
    )


# What a network takes ("vectors", "images1", ...) and makes ("vector", "steps" or "two" of them).
NETS: dict[str, tuple[str, str, Callable[[Shape], nn.Module]]] = {
    "linear": ("vectors", "vector", lambda s: _mlp(s, 0)),
    "mlp": ("vectors", "vector", lambda s: _mlp(s, 1)),
    "deep": ("vectors", "vector", lambda s: _mlp(s, 2)),
    "twice": ("vectors", "vector", Twice),
    "skip": ("vectors", "vector", Skip),
    "heads": ("vectors", "two", Heads),
    "conv1": ("images1", "vector", lambda s: _conv(s, 1, 1, 2, "zeros", s.norm)),
    "conv1_groups": ("images1", "vector", lambda s: _conv(s, 1, 2, 1, "circular", "group")),
    "conv2": ("images2", "vector", lambda s: _conv(s, 2, 1, 2, "reflect", s.norm)),
    "conv2_groups": ("images2", "vector", lambda s: _conv(s, 2, 2, 2, "replicate", s.norm)),
    "conv2_same": ("images2", "vector", lambda s: _conv(s, 2, 2, 1, "same", s.norm)),
    "tokens": ("steps", "steps", _mixing),
    "attention": ("steps", "steps", Attention),
    "multihead": ("steps", "steps", Multihead),
    "multihead_time": ("steps", "steps", lambda s: Multihead(s, batch_first=False)),
    "encoder": ("steps", "steps", _encoder),
    "lstm": ("steps", "steps", lambda s: Recurrent(s, nn.LSTM, True, False)),
    "lstm_last": ("steps", "vector", lambda s: Recurrent(s, nn.LSTM, True, True)),
    "gru_time": ("steps", "vector", lambda s: Recurrent(s, nn.GRU, False, True)),
    "projected": ("steps", "steps", Projected),
    "lstm_cell": ("steps", "steps", lambda s: Loop(s, nn.LSTMCell, False)),
    "gru_cell": ("steps", "vector", lambda s: Loop(s, nn.GRUCell, True)),
    "places": ("steps", "vector", Places),
    "forms": ("vectors", "vector", Forms),
    "transposed": ("images1", "vector", _transposed),
    "normed": ("vectors", "vector", _normed),
    "time_inside": ("steps", "steps", TimeFirstInside),
    "words": ("words", "steps", _words),
    "words_mean": ("words", "vector", _words_mean),
    "tied": ("words", "steps", Tied),
    "scaled": ("vectors", "vector", Scaled),
    "functional": ("vectors", "vector", Functional),
    "experts": ("vectors", "vector", Experts),
    "experts_steps": ("steps", "steps", Experts),
    "bag": ("words", "vector", _bag),
}
# Nets whose covered layers are Linear layers and convolutions only.
KRONECKER = (
    "linear",
    "mlp",
    "deep",
    "twice",
    "skip",
    "heads",
    "tokens",
    "attention",
    "conv1",
    "conv1_groups",
)


def draw_inputs(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """Inputs of `count` examples."""
    if kind == "words":
        return torch.randint(WORDS, (count, STEPS), generator=generator)
    shape = {
        "vectors": (EXAMPLES_FIRST,),
        "images1": (2, 7),
        "images2": (2, 5, 4),
        "steps": (STEPS, EXAMPLES_FIRST),
    }[kind]
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def make_net(name: str, shape: Shape) -> nn.Module:
    """The network with weights and statistics as after training, drawn from the global generator."""
    net = NETS[name][2](shape).double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
        for p in net.parameters():  # norms and biases that are not those of an initialisation
            p.add_(0.2 * torch.randn(p.shape, dtype=torch.float64))
        heads = [m for m in net.modules() if isinstance(m, nn.Linear) and not is_parametrized(m)]
        if shape.zero_head and heads:  # as many begin to train: all examples of a label have one loss
            for p in heads[-1].parameters():
                p.zero_()
    return net
