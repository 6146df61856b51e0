"""Squared error: ``F.mse_loss``.

With ``d`` output elements an example and a mean reduction, ``l_n = (1/d) sum_i w_i (f_i - y_i)^2`` has the
gradient ``(2/d) w (f - y)`` and the Hessian ``(2/d) diag(w)``, which is also the covariance of the gradient
at targets ``y_i = f_i + eps_i`` with ``eps_i`` normal of variance ``d / (2 w_i)``. For sums ``1/d`` becomes
1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_influence.model.losses.draws import draw_normal
from lightning_influence.model.losses.elementwise import ElementwiseLoss, compared
from lightning_influence.model.losses.loss import Reduction
from lightning_influence.model.losses.registry import register_loss


@dataclass(frozen=True, eq=False)
class ComparingLoss(ElementwiseLoss):
    """A loss of the difference between outputs and targets, which are of one shape, weighted or not."""

    def weights(self) -> Tensor:
        """Return the mean weight of the example's elements for a weighted mean, else 1, shape ``(B,)``."""
        if self.element_weights is None or self.reduction != "mean":
            return self.ones()
        return self._weighted(torch.ones_like(self.detached)).reshape(self.num_examples, -1).mean(1)


@dataclass(frozen=True, eq=False)
class SquaredErrorLoss(ComparingLoss):
    """Squared error, weighted or not; the targets are in the shape of the outputs."""

    def terms(self, outputs: Tensor) -> Tensor:
        """Return ``(f - y)^2``."""
        return (outputs - self.goals).square()

    def slopes(self) -> Tensor:
        """Return ``2 (f - y)``."""
        return 2 * (self.detached - self.goals)

    def bends(self) -> Tensor:
        """Return 2."""
        return torch.full_like(self.detached, 2)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one random seed: normal, independent, with the curvature for its variance."""
        curvature = self.curvature()
        return curvature.sqrt() * draw_normal(curvature, generator)


@register_loss(functional.mse_loss)
def parse_mse_loss(
    input: Tensor, target: Tensor, reduction: Reduction = "mean", weight: Tensor | None = None
) -> SquaredErrorLoss:
    """Read a call of ``F.mse_loss``; either of its first two arguments may be the outputs.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if both sides depend on the parameters, or the targets broadcast the outputs.
    """
    outputs, targets = compared("F.mse_loss", input, target, weight)
    return SquaredErrorLoss(outputs, targets, len(outputs), reduction, weight)
