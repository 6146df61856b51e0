"""A zoo of small float64 models with data, and LightningModules around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from lightning import LightningModule
from oracle import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError, Reduction
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

TorchLoss = Callable[..., Tensor]  # (outputs, targets, reduction="mean") -> loss of the batch


@dataclass(frozen=True)
class Case:
    """One model with training data and queries.

    Attributes:
        name: key in `CASES`.
        model: plain module in eval mode, float64.
        x, y: N training examples and their targets.
        query_x, query_y: Q queries, drawn alike.
        loss: the oracle's definition of the loss.
        layers: names of the Linear and convolution layers and of all other parameters, in the model's order.
        torch_loss: (outputs, targets, reduction="mean") -> the batch's loss as a user writes it.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor
    loss: Loss
    layers: tuple[str, ...]
    torch_loss: TorchLoss

    def head(self, n: int) -> Case:
        """The same case with its first `n` training examples."""
        return replace(self, x=self.x[:n], y=self.y[:n])

    def with_reduction(self, reduction: Reduction) -> Case:
        """The same case with the loss reduced otherwise over a batch."""
        return replace(self, loss=replace(self.loss, reduction=reduction))

    @property
    def num_parameters(self) -> int:
        own = dict(self.model.named_parameters())
        modules = [self.model.get_submodule(name) for name in self.layers if name not in own]
        single = sum(own[name].numel() for name in self.layers if name in own)
        return single + sum(p.numel() for module in modules for p in module.parameters())

    @property
    def single_position(self) -> bool:
        """Whether every layer is used exactly once per example: Linear layers on vectors, nothing shared."""
        own = dict(self.model.named_parameters())
        layers = [self.model.get_submodule(name) for name in self.layers if name not in own]
        return (
            self.x.ndim == 2 and "shared" not in self.name and all(isinstance(m, nn.Linear) for m in layers)
        )

    def __repr__(self) -> str:
        return f"Case({self.name})"


# ------------------------------------------------------------------------------------------------ models


class MixTokens(nn.Module):
    """Adds the mean over positions, so that positions depend on each other: (B, T, D) -> (B, T, D)."""

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.sin(h.mean(dim=1, keepdim=True))


class Squeeze(nn.Module):
    """(B, 1) -> (B,)."""

    def forward(self, h: Tensor) -> Tensor:
        return h.squeeze(-1)


class Transposed(nn.Module):
    """(B, T, C) -> (B, C, T)."""

    def forward(self, h: Tensor) -> Tensor:
        return h.transpose(1, 2)


class CalledTwice(nn.Module):
    """One layer used in two calls of each forward pass."""

    def __init__(self, first: nn.Module, shared: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.shared, self.last = first, shared, last

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(2):
            h = torch.tanh(self.shared(h))
        return self.last(h)


def _mlp(sizes: tuple[int, ...], activation: Callable[[], nn.Module], bias: bool = True) -> nn.Sequential:
    modules: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        modules += [nn.Linear(d_in, d_out, bias=bias), activation()]
    return nn.Sequential(*modules[:-1])


def _cnn(conv: nn.Module, features: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(conv, activation(), nn.Flatten(), nn.Linear(features, 3))


def _in_place_relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def _bumped(norm: nn.Module) -> nn.Module:
    """Statistics and scale as they are after training, so that forgetting eval mode or the scale shows."""
    norm.running_mean.normal_(0, 0.5)
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, 0, 0.3)
    return norm


# ------------------------------------------------------------------------------------------------ losses


def _torch_cross_entropy(loss: CrossEntropy) -> TorchLoss:
    def compute(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        if loss.class_dim == -1 and outputs.ndim > 2:  # tokens folded into the rows, as language models do
            outputs, targets = outputs.flatten(0, 1), targets.flatten(0, 1)
        weight = None if loss.weight is None else loss.weight.to(outputs)
        return F.cross_entropy(
            outputs,
            targets,
            weight=weight,
            ignore_index=loss.ignore_index,
            reduction=reduction,
            label_smoothing=loss.label_smoothing,
        )

    return compute


def _torch_nll(loss: CrossEntropy) -> TorchLoss:
    def compute(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        weight = None if loss.weight is None else loss.weight.to(outputs)
        return F.nll_loss(outputs, targets, weight, ignore_index=loss.ignore_index, reduction=reduction)

    return compute


def _torch_bce(loss: BinaryCrossEntropy) -> TorchLoss:
    def compute(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        weight, positive = (w if w is None else w.to(outputs) for w in (loss.weight, loss.pos_weight))
        return F.binary_cross_entropy_with_logits(outputs, targets, weight, None, None, reduction, positive)

    return compute


def _torch_mse(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.mse_loss(outputs, targets, reduction=reduction)


def _torch_loss(loss: Loss) -> TorchLoss:
    if isinstance(loss, CrossEntropy):
        return _torch_cross_entropy(loss)
    return _torch_bce(loss) if isinstance(loss, BinaryCrossEntropy) else _torch_mse


# ------------------------------------------------------------------------------------------------ cases

_WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
Targets = Callable[[Tensor], Tensor]  # outputs (n, ...) of the model -> targets


def _labels(outputs: Tensor) -> Tensor:
    return torch.randint(outputs.shape[1], (outputs.shape[0], *outputs.shape[2:]))


def _token_labels(outputs: Tensor) -> Tensor:
    """Labels (n, T) of which example i has its last i mod 3 positions padded."""
    labels = torch.randint(outputs.shape[-1], outputs.shape[:-1])
    for i, row in enumerate(labels):
        row[len(row) - i % 3 :] = -100
    return labels


def _class_first_token_labels(outputs: Tensor) -> Tensor:
    labels = _token_labels(outputs.mT)
    return torch.where(labels == -100, 1, labels)  # ignore_index=1: a label that a class could have


def _distributions(outputs: Tensor) -> Tensor:
    return torch.softmax(torch.randn_like(outputs), dim=1)


def _binary(outputs: Tensor) -> Tensor:
    return torch.randint(2, outputs.shape).double()


def _soft_binary(outputs: Tensor) -> Tensor:
    return torch.rand_like(outputs)


_CE = CrossEntropy()
_MSE = MeanSquaredError()
# name: (model, shape of one input, loss, targets)
_Recipe = tuple[Callable[[], nn.Module], tuple[int, ...], Loss, Targets]
_RECIPES: dict[str, _Recipe] = {
    # One position per example.
    "linear": (lambda: nn.Sequential(nn.Linear(5, 3)), (5,), _CE, _labels),
    "linear_mse": (lambda: nn.Sequential(nn.Linear(4, 3)), (4,), _MSE, torch.randn_like),
    "deep_linear_mse": (lambda: _mlp((4, 5, 3), nn.Identity), (4,), _MSE, torch.randn_like),
    "mlp_gelu": (lambda: _mlp((5, 6, 5, 3), nn.GELU), (5,), _CE, _labels),
    "mlp_tanh_no_bias": (lambda: _mlp((5, 6, 4), nn.Tanh, bias=False), (5,), _CE, _labels),
    "mlp_relu_inplace_weighted": (
        lambda: _mlp((5, 8, 6, 3), _in_place_relu),
        (5,),
        CrossEntropy(weight=_WEIGHTS),
        _labels,
    ),
    "mlp_silu_smoothing": (
        lambda: _mlp((4, 6, 3), nn.SiLU),
        (4,),
        CrossEntropy(label_smoothing=0.2),
        _labels,
    ),
    "mlp_softplus_weighted_smoothing": (
        lambda: _mlp((4, 6, 3), nn.Softplus),
        (4,),
        CrossEntropy(weight=_WEIGHTS, label_smoothing=0.1),
        _labels,
    ),
    "mlp_elu_probabilities": (lambda: _mlp((4, 6, 3), nn.ELU), (4,), _CE, _distributions),
    "mlp_nll": (
        lambda: nn.Sequential(*_mlp((4, 6, 3), nn.Tanh), nn.LogSoftmax(dim=1)),
        (4,),
        CrossEntropy(weight=_WEIGHTS),
        _labels,
    ),
    "mlp_mse": (lambda: _mlp((4, 7, 3), nn.LeakyReLU), (4,), _MSE, torch.randn_like),
    "mlp_bce": (
        lambda: _mlp((4, 6, 3), nn.Sigmoid),
        (4,),
        BinaryCrossEntropy(weight=_WEIGHTS.flip(0), pos_weight=_WEIGHTS),
        _binary,
    ),
    "mlp_bce_single_soft": (
        lambda: nn.Sequential(*_mlp((4, 6, 1), nn.Tanh), Squeeze()),
        (4,),
        BinaryCrossEntropy(),
        _soft_binary,
    ),
    "mlp_batchnorm_dropout": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), _bumped(nn.BatchNorm1d(6)), _in_place_relu(), nn.Dropout(0.5), nn.Linear(6, 3)
        ),
        (4,),
        _CE,
        _labels,
    ),
    # Several positions per example.
    "shared_linear": (
        lambda: CalledTwice(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)),
        (4,),
        _CE,
        _labels,
    ),
    "shared_conv": (
        lambda: nn.Sequential(
            CalledTwice(nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(3, 3, 3, padding=1), nn.Flatten()),
            nn.Linear(18, 3),
        ),
        (2, 6),
        _CE,
        _labels,
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), MixTokens(), nn.Linear(6, 3)),
        (5, 4),
        CrossEntropy(class_dim=-1),
        _token_labels,
    ),
    "tokens_weighted": (
        lambda: nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), MixTokens(), nn.Linear(5, 3)),
        (4, 3),
        CrossEntropy(weight=_WEIGHTS, label_smoothing=0.1, class_dim=-1),
        _token_labels,
    ),
    "tokens_class_first": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), MixTokens(), nn.Linear(5, 3), Transposed()),
        (4, 3),
        CrossEntropy(weight=_WEIGHTS, ignore_index=1),
        _class_first_token_labels,
    ),
    "deep_linear_tokens_mse": (
        lambda: _mlp((3, 4, 2), nn.Identity),
        (4, 3),
        _MSE,
        torch.randn_like,
    ),
    "linear_conv_groups_mse": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, groups=2)),
        (4, 5),
        _MSE,
        torch.randn_like,
    ),
    "tokens_mse": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), MixTokens(), nn.Linear(5, 2)),
        (4, 3),
        _MSE,
        torch.randn_like,
    ),
    "conv1d_stride_dilation": (
        lambda: _cnn(nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2), 20),
        (2, 9),
        _CE,
        _labels,
    ),
    "conv1d_circular_same": (
        lambda: _cnn(nn.Conv1d(3, 3, 4, padding="same", padding_mode="circular"), 21),
        (3, 7),
        _MSE,
        torch.randn_like,
    ),
    "conv2d": (lambda: _cnn(nn.Conv2d(2, 3, 3, padding=1), 48, _in_place_relu), (2, 4, 4), _CE, _labels),
    "conv2d_no_bias_valid": (
        lambda: _cnn(nn.Conv2d(2, 3, (2, 3), padding="valid", bias=False), 18, nn.GELU),
        (2, 4, 4),
        _CE,
        _labels,
    ),
    "conv2d_reflect_groups": (
        lambda: _cnn(
            nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(1, 1), padding_mode="reflect", groups=2), 40
        ),
        (4, 4, 4),
        _CE,
        _labels,
    ),
    "conv2d_replicate_depthwise": (
        lambda: _cnn(
            nn.Conv2d(3, 6, 3, stride=2, padding=2, dilation=(1, 2), padding_mode="replicate", groups=3), 54
        ),
        (3, 4, 5),
        CrossEntropy(weight=_WEIGHTS),
        _labels,
    ),
    "conv2d_same_depthwise_no_bias": (
        lambda: _cnn(nn.Conv2d(3, 3, 2, padding="same", groups=3, bias=False), 27),
        (3, 3, 3),
        _CE,
        _labels,
    ),
    "conv2d_batchnorm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, bias=False),
            _bumped(nn.BatchNorm2d(3)),
            _in_place_relu(),
            nn.MaxPool2d(2),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (2, 6, 6),
        _CE,
        _labels,
    ),
    "conv3d": (
        lambda: _cnn(nn.Conv3d(2, 2, (2, 3, 2), stride=(1, 2, 1), padding=(1, 1, 0), groups=2), 32),
        (2, 3, 4, 3),
        _CE,
        _labels,
    ),
    "conv3d_circular": (
        lambda: _cnn(nn.Conv3d(1, 2, 2, stride=2, padding=1, padding_mode="circular"), 16),
        (1, 3, 3, 3),
        _CE,
        _labels,
    ),
    "segmentation": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1)),
        (2, 3, 3),
        CrossEntropy(weight=_WEIGHTS, ignore_index=2),
        _labels,
    ),
}


def _build(name: str, seed: int, examples: int = 12, queries: int = 3) -> Case:
    make, shape, loss, targets = _RECIPES[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make().double().eval()
        inputs = torch.randn(examples + queries, *shape, dtype=torch.float64)
        labels = targets(model(inputs))
    compute = _torch_nll(loss) if name == "mlp_nll" else _torch_loss(loss)
    n = examples
    blocks = find_blocks(model)
    return Case(name, model, inputs[:n], labels[:n], inputs[n:], labels[n:], loss, blocks, compute)


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the Linear and convolution layers and of all other parameters, in the model's order."""
    mapped = nn.Linear | nn.modules.conv._ConvNd
    return tuple(
        name
        for k, m in model.named_modules()
        for name in (
            [k] if isinstance(m, mapped) else [f"{k}.{n}" for n, _ in m.named_parameters(recurse=False)]
        )
    )


CASES: dict[str, Case] = {name: _build(name, seed) for seed, name in enumerate(_RECIPES)}


# ---------------------------------------------------------------------------------------------- Lightning


class CaseModule(LightningModule):
    """What a user would write around the case's model."""

    def __init__(self, model: nn.Module, torch_loss: TorchLoss, reduction: Reduction, lr: float) -> None:
        super().__init__()
        self.model, self.torch_loss, self.reduction, self.lr = model, torch_loss, reduction, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.torch_loss(self(x), y, reduction=self.reduction)
        loss = loss.mean() if self.reduction == "none" else loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def lightning_module(case: Case, reduction: Reduction | None = None, lr: float = 0.01) -> CaseModule:
    """A LightningModule whose `model` is a copy of the case's, in train mode as a user's is.

    Its layers are `model.<name of case.layers>`. Its loss has the case's own reduction ("mean" for every
    entry of `CASES`) unless `reduction` is given, whose oracle is that of `case.with_reduction(reduction)`.
    """
    chosen = case.loss.reduction if reduction is None else reduction
    return CaseModule(copy.deepcopy(case.model).train(), case.torch_loss, chosen, lr)


def loader(case: Case, batch_size: int, shuffle: bool = False, queries: bool = False) -> DataLoader:
    """Batches (x, y) of the training examples, or of the queries."""
    data = (case.query_x, case.query_y) if queries else (case.x, case.y)
    return DataLoader(TensorDataset(*data), batch_size=batch_size, shuffle=shuffle)
