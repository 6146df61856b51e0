"""How a batch's loss takes the values of a call: as a usual reduction, scaled, weighed, or summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.model.losses.combined import WEIGHTED, ScaledLoss, SumLoss
from lightning_influence.model.losses.divisors import Divisor
from lightning_influence.model.losses.loss import OutputLoss, Reduction
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError
from lightning_influence.support.notes import warn

_MEANS: tuple[Reduction, ...] = ("mean", "position_mean", "example_mean")

_CLASS_WEIGHTS = (
    "The class weights of the training loss differ from batch to batch, so the loss of an example depends on "
    "the examples beside it. Scores take the weights of the batch that the loader puts an example in."
)


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference that two values of one loss may have: 1e-8 in float64, else 1e-4."""
    return 1e-8 if dtype == torch.float64 else 1e-4


def count_ways(loss: OutputLoss, slope: Tensor) -> list[float]:
    """Return the numbers by which a user may divide a sum of values to have their mean.

    Args:
        loss: the call.
        slope: derivative of the batch's loss in what the call returned.
    """
    whole = replace(loss, reduction="sum")
    shares = [replace(whole, reduction=reduction).share() for reduction in _MEANS]
    taken = (slope > 0).sum()
    parts = [part.to(loss.detached.device, torch.float64, non_blocking=True) for part in (*shares, taken)]
    *found, count = torch.stack(parts).tolist()  # one wait for the device
    sizes = [loss.num_examples, len(loss.outputs), slope.numel(), count]
    return [*map(float, sizes), *(1 / share for share in found if 0 < share < math.inf)]


def reduced(loss: OutputLoss, slope: Tensor | float, divisor: Divisor | None) -> OutputLoss:
    """Return a call's loss as the batch's loss takes it.

    Batches of one data set must be taken alike, whatever their sizes and weights: what each adds to the sums
    of values and of weights counts, not its own mean.

    Args:
        loss: the call, under the reduction that it was made with.
        slope: derivative of the batch's loss in what the call returned, of its shape; a number that is known
            to be positive, of a call of one value.
        divisor: what the batch's loss divides the call's values by; None for a sum.

    Returns:
        The loss, under the reduction that is in force.

    Raises:
        LossCaptureError: if the slope is negative somewhere, zero everywhere, or cannot be taken in.
    """
    if not isinstance(slope, Tensor):
        return _scaled(loss, slope, divisor)
    near, taken, largest = tolerance(slope.dtype), slope > 0, slope.max()
    alike = ((slope - largest).abs() <= near * largest) | ~taken
    parts = [slope.min(), largest, slope.sum(), taken.all(), alike.all()]
    facts = torch.stack([part.to(slope.dtype) for part in parts])
    least, factor, total, all_taken, all_alike = facts.tolist()  # one wait for the device
    if not (least >= 0 and factor > 0):
        raise LossCaptureError(
            f"The training loss takes it with a factor of {least:.4g}; accepted are positive ones."
        )
    if loss.reduction != "none":
        return _scaled(loss, total, divisor)
    if all_alike:
        if not all_taken:
            loss = loss.weighted(taken.to(slope.dtype))
        return _scaled(replace(loss, reduction="sum"), factor, divisor)
    if divisor is not None:
        return _divided(loss.weighted(slope * divisor.value), 1.0, divisor)
    if abs(total - 1) <= near:  # by what they were divided is not to be seen
        shares = ScaledLoss.of(loss.weighted(slope * loss.num_examples), 1.0)
        return replace(shares, remark=WEIGHTED)
    return replace(loss.weighted(slope), reduction="sum")


def _scaled(loss: OutputLoss, factor: float, divisor: Divisor | None) -> OutputLoss:
    """Return the loss times a factor, as one of the usual reductions of its values where that is one.

    Args:
        loss: a loss.
        factor: what the batch's loss takes it with.
        divisor: the part of the factor that the batch's loss divides by, if it does.
    """
    near = tolerance(loss.detached.dtype)
    if loss.reduction != "sum" or divisor is None:
        return loss if abs(factor - 1) <= near else ScaledLoss.of(loss, factor, loss.reduction)
    factor *= divisor.value
    # With a factor beside the divisor a reduction fits by chance only, as in a batch of one example.
    for reduction in _MEANS if abs(factor - 1) <= near else ():
        candidate = replace(loss, reduction=reduction)
        total = 1 / float(candidate.share())
        fits = math.isfinite(total) and abs(total - divisor.value) <= near * total
        if fits and (divisor.is_count or reduction != "example_mean"):
            return candidate
    return _divided(loss, factor, divisor)


def _divided(loss: OutputLoss, factor: float, divisor: Divisor) -> OutputLoss:
    """Return the loss whose values, times a factor, are summed and divided by a number of the batch's own."""
    if divisor.is_count and divisor.value == loss.num_examples:
        return ScaledLoss.of(loss, factor)
    by_position = replace(loss, reduction="position_mean")
    relative = divisor.value * float(by_position.share())  # to the number of values
    if factor == relative == 1:
        return by_position
    weight = relative * float(by_position.weights().mean())
    return replace(
        ScaledLoss.of(by_position, factor, "position_mean"), reduction="example_mean", weight=weight
    )


_FACTORS = (
    "The training loss takes the value of a loss function with a factor of {first:.4g} in one batch and of "
    "{other:.4g} in another, so the loss of an example depends on the examples beside it. Scores take the "
    "factor of the batch that the loader puts an example in."
)


class Alike:
    """Looks for what makes batches of one data set be taken differently, which no batch shows alone."""

    def __init__(self) -> None:
        self._first: dict[int, tuple[int, float]] = {}
        self._class_weights: Tensor | None = None
        self._warned = self._told = False

    def check(self, call: OutputLoss, taken: OutputLoss, number: int = 0) -> None:
        """Compare a batch with the first.

        Args:
            call: the loss under the reduction that it was made with.
            taken: the loss under the reduction that is in force.
            number: of the term in a sum of several.

        Raises:
            UnsupportedModelError: if a factor goes with the number of examples.
        """
        if call.reduction != "none":
            self._check_factor(number, taken.num_examples, getattr(taken, "factor", 1.0))
        weights: Tensor | None = getattr(call, "class_weights", None)
        if weights is None or self._warned:
            return
        if self._class_weights is None:
            self._class_weights = weights.detach().clone()
        elif not torch.equal(self._class_weights, weights):
            self._warned = True
            warn(_CLASS_WEIGHTS)

    def _check_factor(self, number: int, count: int, factor: float) -> None:
        known, first = self._first.setdefault(number, (count, factor))
        ratio, sizes = factor / first, count / known
        if sizes != 1 and any(math.isclose(ratio, other, rel_tol=1e-4) for other in (sizes, 1 / sizes)):
            raise UnsupportedModelError(
                f"The loss function's value is multiplied with {first:.4g} in a batch of {known} examples "
                f"and with {factor:.4g} in one of {count}: it is made a sum, or a mean, by hand. Use its "
                "own reduction='sum' or 'mean' (a sum divided by the number of examples is a mean, too)."
            )
        if not self._told and not math.isclose(ratio, 1, rel_tol=1e-3):
            self._told = True
            warn(_FACTORS.format(first=first, other=factor))


def summed(losses: Sequence[OutputLoss]) -> OutputLoss:
    """Return the sum of losses, each normalised by the weights of its batch.

    Sums over the examples stay sums if all terms are.
    """
    if all(loss.reduction == "sum" for loss in losses):
        return SumLoss.of(losses, "sum")
    terms = []
    for loss in losses:
        weights = loss.weights()
        total, least, most = torch.stack([weights.sum(), weights.min(), weights.max()]).tolist()
        factor, remark = loss.scale * loss.num_examples / total, WEIGHTED if least < most else None
        scaled = replace(ScaledLoss.of(loss, factor, loss.reduction), remark=remark)
        terms.append(loss if factor == 1 and remark is None else scaled)
    return SumLoss.of(terms, "example_mean")
