"""Random losses: as users write them for a batch, and as a formula for one example, in float64.

A formula gives the unnormalised loss of an example and its weight: the training loss is the sum of the former
over that of the latter. Formulas use no loss function of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Formula = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, float | Tensor]]
IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """What losses may be asked for."""

    reduction: str
    classes: Tensor | None  # class weights, or of the elements of an output
    smoothing: float
    ignored: bool


@dataclass(frozen=True)
class LossKind:
    """One loss.

    Attributes:
        targets: what it is about: "labels", "values", "bits", "counts", "shares" or "both".
        batch: (settings, outputs, targets, weights or mask) -> the batch's loss as a user writes it.
        example: (settings, outputs of one example, its target, its weight or mask) -> (loss, weight).
        outputs: which outputs it takes.
        named: whether it is made of functions of torch's that are known by name.
        coupled: why it has no losses of single examples, if so.
        bend: (settings, outputs, target) -> curvature in the outputs where it is not the second derivative.
        uses_weights: whether it uses the weights or the mask of the batch.
    """

    targets: str
    batch: Callable[[Settings, Any, Any, Tensor], Tensor]
    example: Callable[[Settings, Any, Any, Tensor], tuple[Tensor, Any]] | None
    outputs: tuple[str, ...] = ("vector", "steps")
    named: bool = True
    coupled: str = ""
    bend: Callable[[Settings, Tensor, Tensor], Tensor] | None = None
    uses_weights: bool = False


def _reduced(s: Settings, values: Tensor) -> Tensor:
    return {"mean": values.mean, "sum": values.sum, "none": values.mean}[s.reduction]()


def _rows(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of classes `(rows, C)` and their targets."""
    return z.reshape(-1, z.shape[-1]), t.reshape(-1, *t.shape[z.ndim - 1 :])


# ---------------------------------------------------------------------- classification


def _cross_entropy(s: Settings, z: Tensor, t: Tensor, reduction: str | None = None) -> Tensor:
    reduction = s.reduction if reduction is None else reduction
    return F.cross_entropy(z, t, s.classes, reduction=reduction, label_smoothing=s.smoothing)


def _batch_ce(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return _cross_entropy(s, *_rows(z, t)).mean()


def _batch_ce_classes_second(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return _cross_entropy(s, z.mT if z.ndim == 3 else z, t).mean()


def _batch_ce_time_first(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return _cross_entropy(s, *_rows(z.transpose(0, 1), t.T)).mean()


def _nll(s: Settings, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one example: losses of its rows, their weights, and whether they count."""
    z, t = z.reshape(-1, z.shape[-1]), t.reshape(-1)
    C, counts = z.shape[-1], t != IGNORED
    hot = (t[:, None] == torch.arange(C)).double()
    classes = torch.ones(C, dtype=torch.float64) if s.classes is None else s.classes
    goal = (hot * (1 - s.smoothing) + s.smoothing / C) * classes * counts[:, None]
    log_p = z - torch.logsumexp(z, -1, keepdim=True)
    return -(goal * log_p).sum(-1), (hot * classes).sum(-1), counts


def _example_ce(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    losses, weights, _ = _nll(s, z, t)
    return losses.sum(), {"mean": weights.sum(), "sum": 1.0, "none": float(len(losses))}[s.reduction]


def _batch_ce_soft(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return _cross_entropy(s, *_rows(z, t)).mean()


def _example_ce_soft(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    z, t = z.reshape(-1, z.shape[-1]), t.reshape(-1, z.shape[-1])
    classes = torch.ones(z.shape[-1], dtype=torch.float64) if s.classes is None else s.classes
    goal = (t * (1 - s.smoothing) + s.smoothing / z.shape[-1]) * classes
    value = -(goal * (z - torch.logsumexp(z, -1, keepdim=True))).sum()
    return value, 1.0 if s.reduction == "sum" else float(len(z))


def _batch_nll(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    z, t = _rows(z, t)
    return F.nll_loss(F.log_softmax(z, -1), t, s.classes, reduction=s.reduction).mean()


def _plain(s: Settings) -> Settings:
    return Settings(s.reduction, s.classes, 0.0, s.ignored)


def _example_nll(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    return _example_ce(_plain(s), z, t, w)


def _by_hand(s: Settings, z: Tensor, t: Tensor) -> Tensor:
    return -torch.log_softmax(z, -1).gather(-1, t.clamp_min(0)[..., None])[..., 0]


def _batch_hand(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return _reduced(s, _by_hand(s, z, t))


def _example_hand(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    z, t = z.reshape(-1, z.shape[-1]), t.reshape(-1).clamp_min(0)
    picked = z[torch.arange(len(z)), t] - torch.logsumexp(z, -1)
    return -picked.sum(), 1.0 if s.reduction == "sum" else float(len(z))


def _batch_focal(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    nll = _by_hand(s, z, t)
    return _reduced(s, (1 - (-nll).exp()) ** 2 * nll)


def _example_focal(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    z, t = z.reshape(-1, z.shape[-1]), t.reshape(-1).clamp_min(0)
    nll = torch.logsumexp(z, -1) - z[torch.arange(len(z)), t]
    value = (nll * (1 - torch.exp(-nll)) ** 2).sum()
    return value, 1.0 if s.reduction == "sum" else float(len(z))


def _none(s: Settings, z: Tensor, t: Tensor) -> Tensor:
    rows = _cross_entropy(s, *_rows(z, t), reduction="none")
    return rows.reshape(z.shape[:-1])


def _batch_ce_weighed(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return (_none(s, z, t) * w).mean()


def _example_ce_weighed(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    losses = _nll(s, z, t)[0]
    return (losses * w).sum(), float(len(losses))


def _batch_ce_share(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return (_none(s, z, t) * w).sum() / w.sum()


def _example_ce_share(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    return (_nll(s, z, t)[0] * w).sum(), w.double().sum()


def _batch_ce_picked(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(z[w], t[w])


def _example_ce_picked(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    losses, _, counts = _nll(Settings("mean", None, 0.0, False), z, t)
    return (losses * w).sum(), (w & counts).double().sum()


def _batch_ce_index(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    rows = w.nonzero(as_tuple=True)
    return F.cross_entropy(z[rows], t[rows])


def _batch_ce_slices(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    lengths = w.sum(1).tolist()
    parts = [(z[n, :length], t[n, :length]) for n, length in enumerate(lengths)]
    return F.cross_entropy(torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts]))


def _batch_ce_select(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return _by_hand(s, z, t).masked_select(w).mean()


def _batch_ce_lengths(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return ((_none(s, z, t) * w).sum(1) / w.sum(1)).mean()


def _example_ce_lengths(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    return (_nll(s, z, t)[0] * w).sum() / w.double().sum(), 1.0


def _batch_kl(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    z, t = _rows(z, t)
    reduction = {"mean": "batchmean", "sum": "sum", "none": "batchmean"}[s.reduction]
    return F.kl_div(F.log_softmax(z, -1), t, reduction=reduction)


def _example_kl(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    z, t = z.reshape(-1, z.shape[-1]), t.reshape(-1, z.shape[-1])
    value = (t * (t.log() - z + torch.logsumexp(z, -1, keepdim=True))).sum()
    return value, 1.0 if s.reduction == "sum" else float(len(z))


# ---------------------------------------------------------------------- regression


def _elementwise(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    def compute(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return function(z, t, reduction=s.reduction, **options).mean()

    return compute


def _each(formula: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Any]]:
    def compute(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
        values = formula(z, t)
        return (values.sum() if s.reduction == "sum" else values.sum() / values.numel()), 1.0

    return compute


def _hand_each(formula: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda s, z, t, w: _reduced(s, formula(z, t))


def _bce(z: Tensor, t: Tensor) -> Tensor:
    return t * torch.log1p(torch.exp(-z)) + (1 - t) * torch.log1p(torch.exp(z))


def _batch_bce(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    options = {} if s.classes is None else {"pos_weight": s.classes}
    return F.binary_cross_entropy_with_logits(z, t, reduction=s.reduction, **options).mean()


def _example_bce(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    p = 1.0 if s.classes is None else s.classes
    values = p * t * torch.log1p(torch.exp(-z)) + (1 - t) * torch.log1p(torch.exp(z))
    return (values.sum() if s.reduction == "sum" else values.sum() / values.numel()), 1.0


def _batch_probabilities(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.binary_cross_entropy(z.sigmoid(), t, reduction=s.reduction).mean()


def _huber(z: Tensor, t: Tensor) -> Tensor:
    e = (z - t).abs()
    return torch.where(e < 0.7, e * e / 2, 0.7 * (e - 0.35))


def _unit(s: Settings, z: Tensor) -> float:
    return 1.0 if s.reduction == "sum" else 1.0 / z.numel()


def _batch_mse_weighed(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return (F.mse_loss(z, t, reduction="none").flatten(1).mean(1) * w).mean()


def _example_mse_weighed(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Any]:
    return w * ((z - t) ** 2).mean(), 1.0


def _batch_two(s: Settings, z: Any, t: Any, w: Tensor) -> Tensor:
    return _cross_entropy(s, z[0], t[0]).mean() + 0.7 * F.mse_loss(z[1], t[1], reduction=s.reduction).mean()


def _example_two(s: Settings, z: Any, t: Any, w: Tensor) -> tuple[Tensor, Any]:
    s = Settings("sum", s.classes, s.smoothing, False)
    return _nll(s, z[0], t[0])[0].sum() + 0.7 * ((z[1] - t[1]) ** 2).sum(), 1.0


def _halves(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    half, losses = (len(z) + 1) // 2, _by_hand(s, z, t)
    return 0.7 * losses[:half].sum() + 0.3 * losses[half:].sum()


def _gaussian(s: Settings, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.gaussian_nll_loss(z, t, torch.full_like(z, 0.5), reduction=s.reduction).mean()


def _pinball(z: Tensor, t: Tensor) -> Tensor:
    return torch.maximum(0.3 * (z - t), 0.7 * (t - z))


LOSSES: dict[str, LossKind] = {
    "ce": LossKind("labels", _batch_ce, _example_ce),
    "ce_classes_second": LossKind("labels", _batch_ce_classes_second, _example_ce),
    "ce_soft": LossKind("shares", _batch_ce_soft, _example_ce_soft),
    "nll": LossKind("labels", _batch_nll, _example_nll),
    "ce_time_first": LossKind("labels", _batch_ce_time_first, _example_ce, ("steps",)),
    "ce_weighed": LossKind("labels", _batch_ce_weighed, _example_ce_weighed, ("vector",), uses_weights=True),
    "ce_share": LossKind("labels", _batch_ce_share, _example_ce_share, uses_weights=True),
    "ce_picked": LossKind("labels", _batch_ce_picked, _example_ce_picked, ("steps",), uses_weights=True),
    "ce_index": LossKind("labels", _batch_ce_index, _example_ce_picked, ("steps",), uses_weights=True),
    "ce_slices": LossKind("labels", _batch_ce_slices, _example_ce_picked, ("steps",), uses_weights=True),
    "ce_select": LossKind("labels", _batch_ce_select, _example_ce_picked, ("steps",), uses_weights=True),
    "ce_lengths": LossKind("labels", _batch_ce_lengths, _example_ce_lengths, ("steps",), uses_weights=True),
    "ce_hand": LossKind("labels", _batch_hand, _example_hand, named=False),
    "focal": LossKind("labels", _batch_focal, _example_focal, named=False),
    "kl": LossKind("shares", _batch_kl, _example_kl),
    "mse": LossKind("values", _elementwise(F.mse_loss), _each(lambda z, t: (z - t) ** 2)),
    "mse_hand": LossKind(
        "values", _hand_each(lambda z, t: (z - t) ** 2), _each(lambda z, t: (z - t) ** 2), named=False
    ),
    "mse_weighed": LossKind(
        "values", _batch_mse_weighed, _example_mse_weighed, ("vector",), uses_weights=True
    ),
    "huber": LossKind("values", _elementwise(F.huber_loss, delta=0.7), _each(_huber)),
    "l1": LossKind(
        "values",
        _elementwise(F.l1_loss),
        _each(lambda z, t: (z - t).abs()),
        bend=lambda s, z, t: _unit(s, z) * torch.eye(z.numel(), dtype=torch.float64),
    ),
    "logcosh": LossKind(
        "values",
        _hand_each(lambda z, t: torch.log(torch.cosh(z - t))),
        _each(lambda z, t: torch.logaddexp(z - t, t - z)),
        named=False,
    ),
    "pinball": LossKind("values", _hand_each(_pinball), _each(_pinball), named=False),
    "gaussian": LossKind("values", _gaussian, _each(lambda z, t: (z - t) ** 2)),
    "poisson": LossKind("counts", _elementwise(F.poisson_nll_loss), _each(lambda z, t: z.exp() - t * z)),
    "bce": LossKind("bits", _batch_bce, _example_bce),
    "bce_probabilities": LossKind("bits", _batch_probabilities, _each(_bce)),
    "two": LossKind("both", _batch_two, _example_two, ("two",)),
    "halves": LossKind("labels", _halves, None, named=False, coupled="another weight in the first half"),
    "dropped": LossKind(
        "labels",
        lambda s, z, t, w: _by_hand(s, z, t)[: max(1, len(z) - 1)].mean(),
        None,
        named=False,
        coupled="the last one is left out",
    ),
    "mixed": LossKind(
        "labels",
        lambda s, z, t, w: F.cross_entropy(_rows(z + 0.3 * z.roll(1, 0), t)[0], _rows(z, t)[1]),
        None,
        named=False,
        coupled="outputs of neighbours",
    ),
    "rmse": LossKind(
        "values", lambda s, z, t, w: F.mse_loss(z, t).sqrt(), None, named=False, coupled="a root of a mean"
    ),
    "centred": LossKind(
        "values",
        lambda s, z, t, w: F.mse_loss(z - z.mean(0), t),
        None,
        named=False,
        coupled="a mean of the batch",
    ),
    "contrast": LossKind(
        "labels",
        lambda s, z, t, w: F.cross_entropy(z.flatten(1) @ z.flatten(1).T, torch.arange(len(z))),
        None,
        named=False,
        coupled="examples as classes",
    ),
    "hardest": LossKind(
        "labels",
        lambda s, z, t, w: _by_hand(s, z, t).flatten().sort().values[: (len(z) + 1) // 2].mean(),
        None,
        named=False,
        coupled="the easiest half",
    ),
}


def draw_targets(kind: LossKind, s: Settings, outputs: Any, generator: torch.Generator) -> Any:
    """Targets `(N, ...)` for outputs of all examples."""
    if kind.targets == "both":
        labels = torch.randint(outputs[0].shape[-1], (len(outputs[0]),), generator=generator)
        return labels, torch.randn(outputs[1].shape, generator=generator, dtype=torch.float64)
    shape = outputs.shape
    if kind.targets == "labels":
        labels = torch.randint(shape[-1], shape[:-1], generator=generator)
        hidden = torch.rand(labels.shape, generator=generator) < 0.3
        return torch.where(hidden, IGNORED, labels) if s.ignored else labels
    if kind.targets == "shares":
        return torch.softmax(torch.randn(shape, generator=generator, dtype=torch.float64), -1)
    if kind.targets == "bits":
        return torch.randint(2, shape, generator=generator).double()
    if kind.targets == "counts":
        return torch.randint(4, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64)
