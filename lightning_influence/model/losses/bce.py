"""Logistic losses: ``F.binary_cross_entropy_with_logits``.

With ``p = sigmoid(f)``, target ``y``, weight ``w`` and positive weight ``v``, one element's term is ``-w (v y
log p + (1 - y) log(1 - p))``. Its gradient is ``w ((1 - y) p - v y (1 - p))`` and its second derivative ``c p
(1 - p)`` with ``c = w (1 - y + v y)``: the variance of ``sqrt(c) (p - y')`` for ``y'`` drawn from
Bernoulli(p). A mean over the ``d`` elements of an example divides all of it by ``d``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_influence.model.losses.draws import draw_bits
from lightning_influence.model.losses.elementwise import ElementwiseLoss
from lightning_influence.model.losses.loss import working
from lightning_influence.model.losses.registry import constant, reduction_of, register
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropyLoss(ElementwiseLoss):
    """Binary cross-entropy of logits; hard or soft targets in the shape of the outputs.

    Attributes:
        pos_weight: factor of the positive part of each term, broadcast to the shape of the outputs, or None.
    """

    pos_weight: Tensor | None = None

    def per_example(self) -> Tensor:
        """Return the mean of the example's terms (their sum for sums), shape ``(B,)``, differentiable."""
        weight, positive = self._factors()
        values = functional.binary_cross_entropy_with_logits(
            working(self.outputs), self._targets(), weight=weight, pos_weight=positive, reduction="none"
        )
        return values.reshape(self.num_examples, -1).sum(1) * self.unit

    def gradient(self) -> Tensor:
        """Return the seed of the training loss, ``w ((1 - y) p - v y (1 - p)) / d``."""
        weight, positive = self._factors()
        p, y = self._probabilities(), self._targets()
        return self.unit * weight * ((1 - y) * p - positive * y * (1 - p))

    def curvature(self) -> Tensor:
        """Return ``c p (1 - p) / d``, in the shape of the outputs."""
        p = self._probabilities()
        return self.unit * self._coefficient() * p * (1 - p)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one random seed: ``sqrt(c / d) (p - y')`` with ``y'`` drawn from Bernoulli(p)."""
        p = self._probabilities()
        return (self.unit * self._coefficient()).sqrt() * (p - draw_bits(p, generator))

    def true_score(self) -> Tensor:
        """Return the logit, negated where the label is 0, summed over the elements that count, ``(B,)``.

        Raises:
            UnsupportedModelError: if the targets are soft.
        """
        targets, coefficient = self._targets(), self._coefficient()
        if not bool(((targets == 0) | (targets == 1) | (coefficient == 0)).all()):
            raise UnsupportedModelError(
                "The binary cross-entropy has soft targets, so no label is the true one. Accepted for "
                "`margin` and `logit` are targets of 0 and 1; measure the loss, or pass a callable."
            )
        scores = torch.where(coefficient > 0, (2 * targets - 1) * working(self.outputs), 0.0)
        return scores.reshape(self.num_examples, -1).sum(1)

    def margin(self) -> Tensor:
        """Return the log-odds of the true labels, ``(B,)``: the same as :meth:`true_score` here.

        Raises:
            UnsupportedModelError: if the targets are soft.
        """
        return self.true_score()

    def _probabilities(self) -> Tensor:
        return working(self.outputs.detach()).sigmoid()

    def _targets(self) -> Tensor:
        return self.targets.detach().to(working(self.outputs.detach()).dtype)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return ``w`` and ``v``, each in the shape of the outputs."""
        like = working(self.outputs.detach())
        one = torch.ones((), dtype=like.dtype, device=like.device)
        weight = one if self.element_weights is None else self.element_weights.detach().to(like.dtype)
        positive = one if self.pos_weight is None else self.pos_weight.detach().to(like.dtype)
        return weight.expand(like.shape), positive.expand(like.shape)

    def _coefficient(self) -> Tensor:
        """Return ``c = w (1 - y + v y)``."""
        weight, positive = self._factors()
        targets = self._targets()
        return weight * (1 - targets + positive * targets)


@register(functional.binary_cross_entropy_with_logits)
def parse_bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> BinaryCrossEntropyLoss:
    """Read a call of ``F.binary_cross_entropy_with_logits``; the arguments are its own.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if targets or weights depend on the parameters, or make the curvature negative.
    """
    if input.dim() == 0:
        raise LossCaptureError(
            "Got one logit without a batch dimension. Accepted are outputs of shape (B, ...): keep the "
            "dimension."
        )
    factors = {"weight": weight, "pos_weight": pos_weight}
    for name, factor in factors.items():
        if factor is not None:
            constant(name, factor)
    loss = BinaryCrossEntropyLoss(
        outputs=input,
        targets=constant("target", target),
        num_examples=input.shape[0],
        reduction=reduction_of(reduction, size_average, reduce),
        element_weights=weight,
        pos_weight=pos_weight,
    )
    constant(
        "curvature coefficient weight * (1 - target + pos_weight * target)",
        loss._coefficient(),
        non_negative=True,
    )
    return loss
