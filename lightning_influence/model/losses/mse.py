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
from lightning_influence.model.losses.elementwise import ElementwiseLoss
from lightning_influence.model.losses.loss import working
from lightning_influence.model.losses.registry import constant, reduction_of, register
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError

_NO_LABELS = (
    "The training loss is a squared error, which has no labels, so there is no `margin` or `logit` to "
    "measure. Accepted are `loss` and a callable: measure the loss, or pass a callable that returns one "
    "output per example."
)


@dataclass(frozen=True, eq=False)
class SquaredErrorLoss(ElementwiseLoss):
    """Squared error, weighted or not; the targets are in the shape of the outputs."""

    def per_example(self) -> Tensor:
        """Return the mean of the squared errors (their sum for sums), shape ``(B,)``, differentiable."""
        squares = self._weighted((working(self.outputs) - self._targets()).square())
        return squares.reshape(self.num_examples, -1).sum(1) * self.unit

    def weights(self) -> Tensor:
        """Return the mean weight of the example's elements for a weighted mean, else 1, shape ``(B,)``."""
        if self.element_weights is None or self.reduction != "mean":
            return self.ones()
        weights = self._weighted(torch.ones_like(working(self.outputs.detach())))
        return weights.reshape(self.num_examples, -1).mean(1)

    def gradient(self) -> Tensor:
        """Return the seed of the training loss, ``(2/d) w (f - y)``."""
        return self._weighted(2 * self.unit * (working(self.outputs.detach()) - self._targets()))

    def curvature(self) -> Tensor:
        """Return ``(2/d) w``, in the shape of the outputs."""
        return self._weighted(torch.full_like(working(self.outputs.detach()), 2 * self.unit))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one random seed: normal, independent, with the curvature for its variance."""
        curvature = self.curvature()
        return curvature.sqrt() * draw_normal(curvature, generator)

    def true_score(self) -> Tensor:
        """Not defined for a regression.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(_NO_LABELS)

    def margin(self) -> Tensor:
        """Not defined for a regression.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(_NO_LABELS)

    def _targets(self) -> Tensor:
        return working(self.targets.detach()).to(working(self.outputs.detach()).dtype)

    def _weighted(self, values: Tensor) -> Tensor:
        return values if self.element_weights is None else values * self.element_weights.to(values.dtype)


@register(functional.mse_loss)
def parse_mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> SquaredErrorLoss:
    """Read a call of ``F.mse_loss``; either of its first two arguments may be the outputs.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if both sides depend on the parameters, or the targets broadcast the outputs.
    """
    if target.requires_grad and not input.requires_grad:
        input, target = target, input
    constant("target", target)
    if weight is not None:
        constant("weight", weight, non_negative=True)
    if input.dim() == 0 and target.numel() == 1 and weight is None:  # `squeeze()` on one example
        with torch.enable_grad():
            input, target = input.reshape(1), target.reshape(1)
    if input.dim() == 0 or not _fits(target.shape, input.shape):
        raise LossCaptureError(
            f"F.mse_loss compared outputs of shape {tuple(input.shape)} with targets of shape "
            f"{tuple(target.shape)}. Accepted are targets of the outputs' shape, with a batch dimension: as "
            "it is, every output meets the targets of other examples. Reshape one of them, "
            "`outputs.squeeze(-1)` for instance."
        )
    if weight is not None and weight.shape != input.shape:
        raise LossCaptureError(
            f"F.mse_loss got a weight of shape {tuple(weight.shape)} for outputs of shape "
            f"{tuple(input.shape)}. Accepted is a weight of the outputs' shape: expand it, with the outputs "
            "as the first argument."
        )
    return SquaredErrorLoss(
        outputs=input,
        targets=target.expand(input.shape),
        num_examples=input.shape[0],
        reduction=reduction_of(reduction, size_average, reduce),
        element_weights=weight,
    )


def _fits(shape: torch.Size, outputs: torch.Size) -> bool:
    """Return whether a tensor of one shape expands to the other."""
    pairs = zip(reversed(shape), reversed(outputs), strict=False)
    return len(shape) <= len(outputs) and all(size in {1, full} for size, full in pairs)
