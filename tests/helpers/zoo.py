"""Trained models on real and generated data, larger than those of `models`, for what holds on any model.

MLPs, convolutional networks and a transformer made of Linear layers; classification, regression, sequences.
Each is trained for a few steps, so that its curvature is that of a fit and not of an initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import sklearn.datasets
import torch
from models import Case, MixTokens, Squeeze, _bumped, _mlp, _torch_loss, find_blocks
from oracle import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError
from torch import Tensor, nn

EXAMPLES, QUERIES = 96, 4
_STEPS = 60


class Attention(nn.Module):
    """One head of self-attention out of three Linear layers, with a residual connection: (B, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        weights = self.query(h) @ self.key(h).transpose(1, 2) / math.sqrt(h.shape[-1])
        return h + torch.softmax(weights, dim=-1) @ self.value(h)


class Residual(nn.Module):
    """h + f(h)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        return h + self.inner(h)


class MeanOverTokens(nn.Module):
    """(B, T, D) -> (B, D)."""

    def forward(self, h: Tensor) -> Tensor:
        return h.mean(dim=1)


def _transformer(tokens: int, width: int, *head: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(tokens, width, bias=False),
        Attention(width),
        Residual(_mlp((width, 16, width), nn.GELU)),
        *head,
    )


def _cnn(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers)


Data = tuple[Tensor, Tensor]


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(dim=0)) / x.std(dim=0).clamp_min(1e-6)


def _sklearn(load: Callable[..., Data]) -> Data:
    x, y = load(return_X_y=True)
    return torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y)


def _digits() -> Data:
    x, y = _sklearn(sklearn.datasets.load_digits)
    return x / 16, y.long()


def _images() -> Data:
    x, _ = _digits()
    return x, x


def _diabetes() -> Data:
    x, y = _sklearn(sklearn.datasets.load_diabetes)
    return _standard(x), _standard(y[:, None].double())


def _two_targets() -> Data:
    x, y = _diabetes()
    return x[:, :8], torch.cat([y, x[:, 8:9]], dim=1)


def _cancer() -> Data:
    x, y = _sklearn(sklearn.datasets.load_breast_cancer)
    return _standard(x), y.double()


def _text() -> Data:
    """Sequences of 6 of 8 symbols, where each depends on the one before, as one-hot vectors."""
    table = torch.softmax(2 * torch.randn(8, 8, dtype=torch.float64), dim=-1)
    symbols = [torch.randint(8, (EXAMPLES + QUERIES,))]
    for _ in range(6):
        symbols.append(torch.multinomial(table[symbols[-1]], 1)[:, 0])
    joined = torch.stack(symbols, dim=1)
    return nn.functional.one_hot(joined[:, :-1], 8).double(), joined[:, 1:]


def _parity() -> Data:
    x, y = _text()
    return x, y.sum(dim=1) % 3


def _waves() -> Data:
    """Noisy waves and their frequencies."""
    frequency = 1 + 2 * torch.rand(EXAMPLES + QUERIES, 1, dtype=torch.float64)
    time = torch.linspace(0, 3, 16, dtype=torch.float64)
    wave = torch.sin(frequency * time) + 0.1 * torch.randn(len(frequency), 16, dtype=torch.float64)
    return wave[:, None], frequency


_CE, _MSE = CrossEntropy(), MeanSquaredError()
_RARE = CrossEntropy(weight=torch.linspace(0.3, 2.0, 10, dtype=torch.float64))
_RECIPES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data], Loss]] = {
    "softmax_regression": (lambda: nn.Sequential(nn.Linear(64, 10)), _digits, _CE),
    "mlp_gelu": (lambda: _mlp((64, 12, 10), nn.GELU), _digits, _CE),
    "mlp_deep_relu": (lambda: _mlp((64, 10, 10, 10), nn.ReLU), _digits, _CE),
    "mlp_weighted": (lambda: _mlp((64, 8, 10), nn.Tanh, bias=False), _digits, _RARE),
    "mlp_smoothing": (lambda: _mlp((64, 8, 10), nn.SiLU), _digits, CrossEntropy(label_smoothing=0.1)),
    "mlp_batchnorm": (
        lambda: nn.Sequential(nn.Linear(64, 8), _bumped(nn.BatchNorm1d(8)), nn.ReLU(), nn.Linear(8, 10)),
        _digits,
        _CE,
    ),
    "mlp_binary": (
        lambda: nn.Sequential(*_mlp((30, 10, 1), nn.Tanh), Squeeze()),
        _cancer,
        BinaryCrossEntropy(),
    ),
    "linear_regression": (lambda: nn.Sequential(nn.Linear(10, 1)), _diabetes, _MSE),
    "mlp_regression": (lambda: _mlp((10, 16, 1), nn.GELU), _diabetes, _MSE),
    "mlp_two_targets": (lambda: _mlp((8, 12, 12, 2), nn.ELU), _two_targets, _MSE),
    "autoencoder": (lambda: _mlp((64, 6, 64), nn.Tanh), _images, _MSE),
    "cnn": (
        lambda: _cnn(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)),
        _digits,
        _CE,
    ),
    "cnn_depthwise": (
        lambda: _cnn(
            nn.Conv2d(1, 4, 3),
            nn.GELU(),
            nn.Conv2d(4, 8, 3, groups=4),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 10),
        ),
        _digits,
        _CE,
    ),
    "cnn_waves": (
        lambda: nn.Sequential(
            nn.Conv1d(1, 6, 5, stride=2), nn.Tanh(), nn.Conv1d(6, 6, 3), nn.Flatten(), nn.Linear(24, 1)
        ),
        _waves,
        _MSE,
    ),
    "transformer_classifier": (
        lambda: _transformer(8, 8, MeanOverTokens(), nn.Linear(8, 3)),
        _parity,
        _CE,
    ),
    "transformer_language": (
        lambda: _transformer(8, 8, nn.Linear(8, 8)),
        _text,
        CrossEntropy(class_dim=-1),
    ),
    "token_mixer": (
        lambda: nn.Sequential(nn.Linear(8, 10), nn.GELU(), MixTokens(), nn.Linear(10, 8)),
        _text,
        CrossEntropy(class_dim=-1),
    ),
}
ZOO = tuple(_RECIPES)


@cache
def zoo(name: str) -> Case:
    """A trained model of the zoo with its data, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(list(_RECIPES).index(name))
        make, data, loss = _RECIPES[name]
        x, y = data()
        order = torch.randperm(len(x))[: EXAMPLES + QUERIES]
        x, y, model = x[order], y[order], make().double().eval()
        torch_loss = _torch_loss(loss)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            torch_loss(model(x[:EXAMPLES]), y[:EXAMPLES]).backward()
            optimizer.step()
        model.zero_grad(set_to_none=True)
    split = (x[:EXAMPLES], y[:EXAMPLES], x[EXAMPLES:], y[EXAMPLES:])
    return Case(name, model, *split, loss, find_blocks(model), torch_loss)
