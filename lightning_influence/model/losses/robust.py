"""Regression losses that grow like the absolute error: ``F.huber_loss``, ``F.smooth_l1_loss``, ``F.l1_loss``.

With the error ``e = f - y``, Huber's loss of ``delta`` is ``e^2 / 2`` for ``|e| <= delta`` and ``delta (|e| -
delta / 2)`` beyond; the smooth L1 loss of ``beta`` is Huber's of ``beta``, divided by ``beta``. Both are
convex; their second derivative is constant where the error is small and zero beyond (Huber 1964).

The absolute error has the second derivative zero wherever it has one, which would leave nothing but the
damping as curvature. What stands in its place is its expectation over errors that follow a Laplace
distribution of scale 1, the distribution whose negative log-likelihood it is: ``E |e|'' = 2 p(0) = 1``. Where
the errors are of another size, all curvatures are off by one common factor, as if the damping were larger or
smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_influence.model.losses.elementwise import compared
from lightning_influence.model.losses.loss import Reduction
from lightning_influence.model.losses.mse import ComparingLoss
from lightning_influence.model.losses.registry import register_loss
from lightning_influence.support.errors import LossCaptureError

_ABSOLUTE = (
    "The training loss is an absolute error, whose second derivative is zero. Its curvature is taken to be 1 "
    "in each output, its expectation for errors from a Laplace distribution of scale 1: where errors are "
    "much larger or smaller, scale the targets or set `damping=` yourself."
)


@dataclass(frozen=True, eq=False)
class HuberLoss(ComparingLoss):
    """Huber's loss, times a factor.

    Attributes:
        delta: size of the error from which on the loss is linear, positive.
        factor: ``1 / delta`` for the smooth L1 loss, else 1.
    """

    delta: float = 1.0
    factor: float = 1.0

    def terms(self, outputs: Tensor) -> Tensor:
        """Return the loss of each error."""
        return self.factor * functional.huber_loss(outputs, self.goals, reduction="none", delta=self.delta)

    def slopes(self) -> Tensor:
        """Return the error, cut off at ``delta`` on either side, times the factor."""
        return self.factor * (self.detached - self.goals).clamp(-self.delta, self.delta)

    def bends(self) -> Tensor:
        """Return the factor where the error is below ``delta``, else 0."""
        inside = (self.detached - self.goals).abs() < self.delta
        return self.factor * inside.to(self.detached.dtype)

    def weights(self) -> Tensor:
        """Return ones: torch's weighted mean of this loss divides by the number of elements, ``(B,)``."""
        return self.ones()


@dataclass(frozen=True, eq=False)
class AbsoluteErrorLoss(ComparingLoss):
    """Absolute error, weighted or not, with the curvature of a Laplace likelihood."""

    @property
    def note(self) -> str:
        """What its curvature stands for."""
        return _ABSOLUTE

    def terms(self, outputs: Tensor) -> Tensor:
        """Return ``|f - y|``."""
        return (outputs - self.goals).abs()

    def slopes(self) -> Tensor:
        """Return the sign of the error."""
        return (self.detached - self.goals).sign()

    def bends(self) -> Tensor:
        """Return 1."""
        return torch.ones_like(self.detached)


@register_loss(functional.huber_loss)
def parse_huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: Reduction = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> HuberLoss:
    """Read a call of ``F.huber_loss``; either of its first two arguments may be the outputs.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: as :func:`~lightning_influence.model.losses.elementwise.compared`.
    """
    outputs, targets = compared("F.huber_loss", input, target, weight)
    return HuberLoss(outputs, targets, len(outputs), reduction, weight, delta)


@register_loss(functional.smooth_l1_loss)
def parse_smooth_l1_loss(
    input: Tensor, target: Tensor, reduction: Reduction = "mean", beta: float = 1.0
) -> ComparingLoss:
    """Read a call of ``F.smooth_l1_loss``, which is the absolute error for ``beta = 0``.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if ``beta`` is negative, and as for ``F.huber_loss``.
    """
    if beta < 0:
        raise LossCaptureError(
            f"F.smooth_l1_loss was called with beta={beta}; accepted are values of at least 0."
        )
    outputs, targets = compared("F.smooth_l1_loss", input, target, None)
    if beta == 0:
        return AbsoluteErrorLoss(outputs, targets, len(outputs), reduction)
    return HuberLoss(outputs, targets, len(outputs), reduction, None, beta, 1 / beta)


@register_loss(functional.l1_loss)
def parse_l1_loss(
    input: Tensor, target: Tensor, reduction: Reduction = "mean", weight: Tensor | None = None
) -> AbsoluteErrorLoss:
    """Read a call of ``F.l1_loss``; either of its first two arguments may be the outputs.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: as for ``F.huber_loss``.
    """
    outputs, targets = compared("F.l1_loss", input, target, weight)
    return AbsoluteErrorLoss(outputs, targets, len(outputs), reduction, weight)
