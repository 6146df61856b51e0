"""Negative log-likelihoods of counts and of normal errors: ``F.poisson_nll_loss``, ``F.gaussian_nll_loss``.

Poisson with rate ``exp(f)``: the loss ``exp(f) - y f`` has the second derivative ``exp(f)``, the variance of
the counts. With the rate ``f`` itself, ``f - y log(f + eps)`` has the second derivative ``y / (f + eps)^2``;
its expectation over counts drawn at this rate, the Fisher information ``f / (f + eps)^2``, is taken, since a
count of zero has no curvature of its own.

Normal with mean ``f`` and variance ``v``: the loss ``(log v + (f - y)^2 / v) / 2`` is not convex in ``(f,
v)``. Its curvature is the Fisher information, which is diagonal: ``1 / v`` for the mean and ``1 / (2 v^2)``
for the variance. Where the network predicts both, outputs are the means of an example followed by its
variances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from lightning_influence.model.losses.elementwise import ElementwiseLoss
from lightning_influence.model.losses.loss import Reduction, working
from lightning_influence.model.losses.registry import constant, register_loss
from lightning_influence.support.errors import LossCaptureError


@dataclass(frozen=True, eq=False)
class PoissonLoss(ElementwiseLoss):
    """Poisson likelihood of counts.

    Attributes:
        log_input: whether outputs are logarithms of the rates.
        full: whether Stirling's approximation of the constant is part of the values.
        eps: added to the rate inside the logarithm.
    """

    log_input: bool = True
    full: bool = False
    eps: float = 1e-8

    def terms(self, outputs: Tensor) -> Tensor:
        """Return the likelihood's negative logarithm."""
        return functional.poisson_nll_loss(
            outputs, self.goals, log_input=self.log_input, full=self.full, eps=self.eps, reduction="none"
        )

    def slopes(self) -> Tensor:
        """Return ``exp(f) - y``, or ``1 - y / (f + eps)``."""
        if self.log_input:
            return self.detached.exp() - self.goals
        return 1 - self.goals / (self.detached + self.eps)

    def bends(self) -> Tensor:
        """Return ``exp(f)``, or ``f / (f + eps)^2``."""
        if self.log_input:
            return self.detached.exp()
        return self.detached.clamp_min(0) / (self.detached + self.eps).square()


@dataclass(frozen=True, eq=False)
class GaussianLoss(ElementwiseLoss):
    """Normal likelihood with a mean and a variance that the network predicts.

    ``outputs (B, 2 d)`` are the ``d`` means of an example and then its variances, ``targets (B, d)``.

    Attributes:
        constant: added to each term.
        eps: least variance.
    """

    constant: float = 0.0
    eps: float = 1e-6

    @property
    def unit(self) -> float:
        """Factor of each element's term: ``1 / d`` for means, 1 for sums."""
        return 2 * super().unit if self.divides_by_positions else 1.0

    def weighted(self, coefficients: Tensor) -> Self:
        """Return the loss with its ``d`` terms weighed, which counts for means and variances alike."""
        coefficients = coefficients.reshape(self.goals.shape)
        if self.element_weights is not None:
            coefficients = coefficients * self.element_weights
        return replace(self, element_weights=coefficients)

    def _weighted(self, values: Tensor) -> Tensor:
        if self.element_weights is None:
            return values
        weights = self.element_weights.to(values.dtype)
        return values * (weights if values.shape == weights.shape else torch.cat([weights, weights], 1))

    def terms(self, outputs: Tensor) -> Tensor:
        """Return the likelihoods' negative logarithms, ``(B, d)``."""
        mean, variance = outputs.chunk(2, 1)
        # Below eps a variance counts as eps, and passes its gradient on: torch's way.
        variance = variance + (variance.detach().clamp_min(self.eps) - variance.detach())
        return (variance.log() + (mean - self.goals).square() / variance) / 2 + self.constant

    def slopes(self) -> Tensor:
        """Return ``(f - y) / v`` and then ``(1 - (f - y)^2 / v) / (2 v)``, ``(B, 2 d)``."""
        error, variance = self._moments()
        return torch.cat([error / variance, (1 - error.square() / variance) / (2 * variance)], 1)

    def bends(self) -> Tensor:
        """Return ``1 / v`` and then ``1 / (2 v^2)``, ``(B, 2 d)``."""
        _, variance = self._moments()
        return torch.cat([1 / variance, 1 / (2 * variance.square())], 1)

    def _moments(self) -> tuple[Tensor, Tensor]:
        mean, variance = self.detached.chunk(2, 1)
        return mean - self.goals, variance.clamp_min(self.eps)


@dataclass(frozen=True, eq=False)
class FixedVarianceLoss(ElementwiseLoss):
    """Normal likelihood with variances that do not depend on the parameters.

    Attributes:
        variance: of each element, in the shape of the outputs, at least ``eps``.
        constant: added to each term.
    """

    variance: Tensor | None = None
    constant: float = 0.0

    def terms(self, outputs: Tensor) -> Tensor:
        """Return the likelihoods' negative logarithms."""
        variance = self._variance()
        return (variance.log() + (outputs - self.goals).square() / variance) / 2 + self.constant

    def slopes(self) -> Tensor:
        """Return ``(f - y) / v``."""
        return (self.detached - self.goals) / self._variance()

    def bends(self) -> Tensor:
        """Return ``1 / v``."""
        return 1 / self._variance()

    def _variance(self) -> Tensor:
        assert self.variance is not None
        return self.variance.detach().to(self.detached.dtype)


@register_loss(functional.poisson_nll_loss)
def parse_poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
    reduction: Reduction = "mean",
) -> PoissonLoss:
    """Read a call of ``F.poisson_nll_loss``; the arguments are its own.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if targets depend on the parameters or broadcast the outputs.
    """
    _check_shapes("F.poisson_nll_loss", input, target)
    return PoissonLoss(input, constant("target", target), len(input), reduction, None, log_input, full, eps)


@register_loss(functional.gaussian_nll_loss)
def parse_gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: Reduction = "mean",
) -> ElementwiseLoss:
    """Read a call of ``F.gaussian_nll_loss``; the arguments are its own.

    Returns:
        The loss, with one example per row. Predicted variances are part of its outputs.

    Raises:
        LossCaptureError: if targets depend on the parameters, or shapes differ from the outputs'.
    """
    _check_shapes("F.gaussian_nll_loss", input, target)
    constant("target", target)
    added = 0.9189385332046727 if full else 0.0  # log(2 pi) / 2
    variance = torch.as_tensor(var, dtype=input.dtype, device=input.device)
    if variance.shape == input.shape[:-1]:  # one for all elements of the last dimension
        with torch.enable_grad():
            variance = variance.unsqueeze(-1)
    if not variance.requires_grad:
        fixed = working(variance.detach()).clamp_min(eps).expand(input.shape)
        return FixedVarianceLoss(input, target, len(input), reduction, None, fixed, added)
    rows = len(input)
    with torch.enable_grad():
        outputs = torch.cat([input.reshape(rows, -1), variance.expand(input.shape).reshape(rows, -1)], 1)
    return GaussianLoss(outputs, target.reshape(rows, -1), rows, reduction, None, added, eps)


def _check_shapes(name: str, input: Tensor, target: Tensor) -> None:
    """Refuse outputs without a batch dimension, and targets of another shape.

    Raises:
        LossCaptureError: naming the shapes.
    """
    if input.dim() == 0 or input.shape != target.shape:
        raise LossCaptureError(
            f"{name} compared outputs of shape {tuple(input.shape)} with targets of shape "
            f"{tuple(target.shape)}. Accepted are targets of the outputs' shape, with a batch dimension."
        )
