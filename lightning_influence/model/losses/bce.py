"""Logistic losses: ``F.binary_cross_entropy_with_logits`` and ``F.binary_cross_entropy``.

With ``p = sigmoid(f)``, target ``y``, weight ``w`` and positive weight ``v``, one element's term is ``-w (v y
log p + (1 - y) log(1 - p))``. Its gradient is ``w ((1 - y) p - v y (1 - p))`` and its second derivative ``c p
(1 - p)`` with ``c = w (1 - y + v y)``: the variance of ``sqrt(c) (p - y')`` for ``y'`` drawn from
Bernoulli(p). A mean over the ``d`` elements of an example divides all of it by ``d``.

Where the outputs are the probabilities themselves, the curvature is the Fisher information ``w / (p (1 -
p))``: behind a sigmoid it gives the same Gauss-Newton matrix as the logits do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from lightning_influence.model.losses.draws import draw_bits
from lightning_influence.model.losses.elementwise import ElementwiseLoss
from lightning_influence.model.losses.loss import Reduction, working
from lightning_influence.model.losses.registry import constant, register_loss
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError

# Torch divides by no less in the gradient of F.binary_cross_entropy, and takes no logarithm below -100.
_LEAST_VARIANCE, _LEAST_LOGARITHM = 1e-12, -100.0


@dataclass(frozen=True, eq=False)
class BernoulliLoss(ElementwiseLoss):
    """What logits and probabilities have in common: hard or soft targets in the shape of the outputs."""

    def labelled(self, log_odds: Tensor) -> Tensor:
        """Sum log-odds, negated where the label is 0, over the elements that count.

        Args:
            log_odds: of a label of 1, in the shape of the outputs.

        Returns:
            Shape ``(B,)``.

        Raises:
            UnsupportedModelError: if the targets are soft.
        """
        counts = self._weighted(self.coefficients) > 0
        if not bool(((self.goals == 0) | (self.goals == 1) | ~counts).all()):
            raise UnsupportedModelError(
                "The binary cross-entropy has soft targets, so no label is the true one. Accepted for "
                "`margin` and `logit` are targets of 0 and 1; measure the loss, or pass a callable."
            )
        scores = torch.where(counts, (2 * self.goals - 1) * log_odds, 0.0)
        return scores.reshape(self.num_examples, -1).sum(1)

    @property
    def coefficients(self) -> Tensor:
        """Factor of each element's curvature beside the weight, in the shape of the outputs: 1."""
        return torch.ones_like(self.detached)


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropyLoss(BernoulliLoss):
    """Binary cross-entropy of logits.

    Attributes:
        pos_weight: factor of the positive part of each term, broadcast to the shape of the outputs, or None.
    """

    pos_weight: Tensor | None = None

    def terms(self, outputs: Tensor) -> Tensor:
        """Return ``-v y log p - (1 - y) log(1 - p)``."""
        return functional.binary_cross_entropy_with_logits(
            outputs, self.goals, pos_weight=self._positive, reduction="none"
        )

    def slopes(self) -> Tensor:
        """Return ``(1 - y) p - v y (1 - p)``."""
        p, y = self._probabilities, self.goals
        return (1 - y) * p - self._positive * y * (1 - p)

    def bends(self) -> Tensor:
        """Return ``(1 - y + v y) p (1 - p)``."""
        return self.coefficients * self._probabilities * (1 - self._probabilities)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one random seed: ``sqrt(c / d) (p - y')`` with ``y'`` drawn from Bernoulli(p)."""
        residual = self._probabilities - draw_bits(self._probabilities, generator)
        return (self._weighted(self.coefficients) * self.unit).sqrt() * residual

    def true_score(self) -> Tensor:
        """Return the logit, negated where the label is 0, summed over the elements that count, ``(B,)``.

        Raises:
            UnsupportedModelError: if the targets are soft.
        """
        return self.labelled(working(self.outputs))

    def margin(self) -> Tensor:
        """Return the log-odds of the true labels, ``(B,)``: the same as :meth:`true_score` here.

        Raises:
            UnsupportedModelError: if the targets are soft.
        """
        return self.true_score()

    @property
    def coefficients(self) -> Tensor:
        """Return ``1 - y + v y``."""
        return 1 - self.goals + self._positive * self.goals

    @cached_property
    def _probabilities(self) -> Tensor:
        return self.detached.sigmoid()

    @cached_property
    def _positive(self) -> Tensor:
        """Return ``v`` in the shape of the outputs."""
        like = self.detached
        return (
            like.new_ones(()) if self.pos_weight is None else self.pos_weight.detach().to(like)
        ).expand_as(like)


@dataclass(frozen=True, eq=False)
class ProbabilityLoss(BernoulliLoss):
    """Binary cross-entropy of probabilities."""

    def terms(self, outputs: Tensor) -> Tensor:
        """Return ``-y log p - (1 - y) log(1 - p)``, logarithms being cut off as torch does."""
        return functional.binary_cross_entropy(outputs, self.goals, reduction="none")

    def slopes(self) -> Tensor:
        """Return ``(p - y) / (p (1 - p))``."""
        return (self.detached - self.goals) / self._variance

    def bends(self) -> Tensor:
        """Return ``1 / (p (1 - p))``, the Fisher information."""
        return 1 / self._variance

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one random seed: ``sqrt(w / d) (p - y') / (p (1 - p))``, ``y'`` drawn from Bernoulli(p)."""
        residual = self.detached - draw_bits(self.detached, generator)
        return (self._weighted(self.coefficients) * self.unit).sqrt() * residual / self._variance

    def true_score(self) -> Tensor:
        """Return the probability, negated where the label is 0, summed over what counts, ``(B,)``.

        Raises:
            UnsupportedModelError: if the targets are soft.
        """
        return self.labelled(working(self.outputs))

    def margin(self) -> Tensor:
        """Return the log-odds of the true labels, summed over the elements that count, ``(B,)``.

        Raises:
            UnsupportedModelError: if the targets are soft.
        """
        p = working(self.outputs)
        return self.labelled(p.log().clamp_min(_LEAST_LOGARITHM) - (-p).log1p().clamp_min(_LEAST_LOGARITHM))

    @cached_property
    def _variance(self) -> Tensor:
        return (self.detached * (1 - self.detached)).clamp_min(_LEAST_VARIANCE)


@register_loss(functional.binary_cross_entropy_with_logits)
def parse_bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    pos_weight: Tensor | None = None,
) -> BinaryCrossEntropyLoss:
    """Read a call of ``F.binary_cross_entropy_with_logits``; the arguments are its own.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if targets or weights depend on the parameters, or make the curvature negative.
    """
    _check(input, target, {"weight": weight, "pos_weight": pos_weight})
    loss = BinaryCrossEntropyLoss(input, target, len(input), reduction, weight, pos_weight)
    constant(
        "curvature coefficient weight * (1 - target + pos_weight * target)",
        loss._weighted(loss.coefficients),
        non_negative=True,
    )
    return loss


@register_loss(functional.binary_cross_entropy)
def parse_bce(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: Reduction = "mean"
) -> ProbabilityLoss:
    """Read a call of ``F.binary_cross_entropy``; the arguments are its own.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if targets or weights depend on the parameters, or a weight is negative.
    """
    _check(input, target, {"weight": weight})
    if weight is not None:
        constant("weight", weight, non_negative=True)
        weight = weight.expand(input.shape)
    return ProbabilityLoss(input, target, len(input), reduction, weight)


def _check(input: Tensor, target: Tensor, factors: dict[str, Tensor | None]) -> None:
    """Refuse outputs without a batch dimension, and arguments that depend on the parameters.

    Raises:
        LossCaptureError: naming the argument.
    """
    if input.dim() == 0:
        raise LossCaptureError(
            "Got one output without a batch dimension. Accepted are outputs of shape (B, ...): keep the "
            "dimension."
        )
    constant("target", target)
    for name, factor in factors.items():
        if factor is not None:
            constant(name, factor)
