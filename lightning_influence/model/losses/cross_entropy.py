"""Softmax losses: ``F.cross_entropy`` and ``F.nll_loss``.

At one position let ``q`` be the target distribution with class weights and smoothing inside, ``s`` its total
and ``p`` the softmax of the logits ``f``. Then the loss is ``-sum_c q_c log p_c``, its gradient ``s p - q``
and its Hessian ``s (diag(p) - p p^T)``, the sum over ``c`` of the outer products of ``sqrt(s p_c) (e_c -
p)``. The Hessian is also the covariance of ``sqrt(s) (p - onehot(y))`` with ``y`` drawn from ``p``.

Shapes: positions are ``(B, T, C)`` here, whatever the shape of the outputs: ``(B, C)`` has ``T = 1``,
``(B, C, d1, ...)`` has ``T = d1 * ...``, and ``(B * T, C)`` keeps the ``T`` rows of an example together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from lightning_influence.model.losses.draws import draw_labels
from lightning_influence.model.losses.loss import OutputLoss, Reduction, working
from lightning_influence.model.losses.registry import constant, register_loss
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError


@dataclass(frozen=True, eq=False)
class CrossEntropyLoss(OutputLoss):
    """Cross-entropy of a softmax, with class-index or probability targets.

    Attributes:
        class_weights: shape ``(C,)``, or None.
        ignore_index: the class index that marks positions to leave out; has no effect on probability targets.
        label_smoothing: share of the uniform distribution in the targets.
        position_weights: factor of each position's loss, in the shape of the labels, or None.
    """

    class_weights: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    position_weights: Tensor | None = None

    def per_example(self) -> Tensor:
        """Return the unnormalised loss of each example, shape ``(B,)``, differentiable in ``outputs``."""
        outputs = working(self.outputs)
        values = functional.cross_entropy(
            outputs,
            self.targets.to(outputs.dtype) if self.has_probabilities else self.targets,
            weight=None if self.class_weights is None else self.class_weights.to(outputs.dtype),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if self.position_weights is not None:
            values = values * self.position_weights.to(values.dtype)
        return values.reshape(self.num_examples, -1).sum(1)

    def weighted(self, coefficients: Tensor) -> Self:
        """Return the loss with its positions weighed."""
        return replace(self, position_weights=coefficients)

    def weights(self) -> Tensor:
        """Return the weight of each example, ``(B,)``: positions, or class weights of its labels."""
        if not self.divides_by_positions:
            return self.ones()
        if self.reduction != "mean" or self.has_probabilities:
            positions = self.num_columns // self.outputs.shape[1]
            if self.reduction != "mean" or self.position_weights is None:
                return self.ones() * positions
            return self._weigh_positions(self.ones()[:, None].expand(-1, positions)).sum(1)
        labels, kept = self._labels()
        return self._weigh_positions(kept * self._class_weights()[labels]).sum(1)

    def gradient(self) -> Tensor:
        """Return the seed of the training loss, ``s p - q`` at each position."""
        target = self._target_distribution()
        return self._to_outputs(target.sum(-1, keepdim=True) * self._softmax - target)

    @property
    def num_columns(self) -> int:
        """``K = T * C``: one column for each class of each position of an example."""
        return self.outputs.numel() // self.num_examples

    def columns(self) -> Iterator[Tensor]:
        """The seeds ``sqrt(s p_c) (e_c - p)``, position by position: each is zero at all other positions."""
        p = self._softmax
        root = (self._mass * p).sqrt()
        for t in range(p.shape[1]):
            for c in range(p.shape[2]):
                seed = torch.zeros_like(p)
                seed[:, t] = -root[:, t, c, None] * p[:, t]
                seed[:, t, c] += root[:, t, c]
                yield self._to_outputs(seed)

    def column_energies(self) -> Tensor:
        """Return ``s p_c (1 - 2 p_c + |p|^2)`` of each class of each position, ``(B, T C)``."""
        p = self._softmax
        return (self._mass * p * (1 - 2 * p + p.square().sum(-1, keepdim=True))).flatten(1)

    def mix_columns(self, weights: Tensor) -> Tensor:
        """Return ``r - p sum_c r_c`` at each position, ``r_c`` being ``sqrt(s p_c)`` times the weight."""
        p = self._softmax
        rows = (self._mass * p).sqrt_().mul_(weights.view(p.shape))  # in place: logits may be large
        return self._to_outputs(rows.addcmul_(p, rows.sum(-1, keepdim=True), value=-1))

    def curvature_products(self, tangents: Tensor) -> Tensor:
        """Return ``s p (t - p^T t)`` at each position, for tangents ``t (V, *outputs.shape)``."""
        p, mass = self._softmax, self._mass
        rows = working(tangents).movedim(2, -1)
        shape = rows.shape
        rows = rows.reshape(len(tangents), *p.shape)
        products = mass * p * (rows - (p * rows).sum(-1, keepdim=True))
        return products.reshape(shape).movedim(-1, 2)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one random seed: ``sqrt(s) (p - onehot(y))``, labels drawn from ``p`` at each position."""
        p = self._softmax
        labels = draw_labels(p, generator).unsqueeze(-1)
        residual = p.scatter_add(-1, labels, -torch.ones_like(p[..., :1]))
        return self._to_outputs(self._mass.sqrt() * residual)

    def true_score(self) -> Tensor:
        """Return the logit of the true label, summed over the positions that count, shape ``(B,)``.

        Raises:
            UnsupportedModelError: if the targets are soft.
        """
        labels, kept = self._hard_labels()
        scores = self._to_positions(working(self.outputs)).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return torch.where(kept, scores, 0.0).sum(1)

    def margin(self) -> Tensor:
        """Return the log-odds of the true label, summed over the positions that count, shape ``(B,)``.

        Raises:
            UnsupportedModelError: if the targets are soft or there is only one class.
        """
        if self.outputs.shape[1] < 2:
            raise UnsupportedModelError("A margin needs at least 2 classes; the loss has 1.")
        labels, kept = self._hard_labels()
        logits = self._to_positions(working(self.outputs))
        index = labels.unsqueeze(-1)
        others = logits.scatter(-1, index, float("-inf")).logsumexp(-1)
        return torch.where(kept, logits.gather(-1, index).squeeze(-1) - others, 0.0).sum(1)

    @property
    def has_probabilities(self) -> bool:
        """Whether the targets are distributions over the classes, in the shape of the outputs."""
        return self.targets.shape == self.outputs.shape

    def _to_positions(self, rows: Tensor) -> Tensor:
        """Return rows ``(R, C, d1, ...)`` as ``(B, T, C)``."""
        return rows.movedim(1, -1).reshape(self.num_examples, -1, rows.shape[1])

    def _to_outputs(self, positions: Tensor) -> Tensor:
        """Return ``(B, T, C)`` in the shape of the outputs."""
        rows, classes, *rest = self.outputs.shape
        return positions.reshape(rows, *rest, classes).movedim(-1, 1)

    @cached_property
    def _softmax(self) -> Tensor:
        """Probabilities of the classes, ``(B, T, C)``."""
        return self._to_positions(self.detached).softmax(-1)

    def _class_weights(self) -> Tensor:
        """Return class weights, ones when there are none, ``(C,)``."""
        like = self.detached
        if self.class_weights is None:
            return torch.ones(like.shape[1], dtype=like.dtype, device=like.device)
        return self.class_weights.detach().to(like.dtype)

    def _labels(self) -> tuple[Tensor, Tensor]:
        """Return class indices, 0 where ignored, and a mask of the positions not ignored, each ``(B, T)``."""
        labels = self.targets.reshape(self.num_examples, -1).long()
        kept = labels != self.ignore_index
        return torch.where(kept, labels, 0), kept

    def _target_distribution(self) -> Tensor:
        """Return ``q`` with class weights and smoothing inside, zero where ignored, ``(B, T, C)``."""
        weights = self._class_weights()
        if self.has_probabilities:
            target, kept = self._to_positions(self.targets).to(weights.dtype), None
        else:
            labels, kept = self._labels()
            target = functional.one_hot(labels, weights.numel()).to(weights.dtype)
        smooth = self.label_smoothing
        target = (target * (1 - smooth) + smooth / weights.numel()) * weights
        if kept is not None:
            target = target * kept.unsqueeze(-1)
        return self._weigh_positions(target)

    def _weigh_positions(self, values: Tensor) -> Tensor:
        """Return values ``(B, T)`` or ``(B, T, C)`` times the weights of the positions."""
        if self.position_weights is None:
            return values
        weights = self.position_weights.to(values.dtype).reshape(self.num_examples, -1)
        return values * (weights if values.dim() == 2 else weights.unsqueeze(-1))

    @cached_property
    def _mass(self) -> Tensor:
        """``s``: total of the target distribution at each position, ``(B, T, 1)``."""
        if self.has_probabilities:
            return self._target_distribution().sum(-1, keepdim=True)
        # Without forming distributions, which take as much memory as the logits.
        (labels, kept), weights, smooth = self._labels(), self._class_weights(), self.label_smoothing
        mass = (1 - smooth) * weights[labels] + smooth * weights.mean()
        return self._weigh_positions(mass * kept).unsqueeze(-1)

    def _hard_labels(self) -> tuple[Tensor, Tensor]:
        """Return class indices and a mask of the positions with any weight, each ``(B, T)``.

        Raises:
            UnsupportedModelError: if the targets are soft.
        """
        kept = self._mass.squeeze(-1) > 0
        if not self.has_probabilities:
            return self._labels()[0], kept
        target = self._to_positions(self.targets)
        if not bool((((target == 0) | (target == 1)).all(-1) & (target.sum(-1) == 1)).all()):
            raise UnsupportedModelError(
                "The cross-entropy has soft probability targets, so no label is the true one. Accepted are "
                "class indices or one-hot targets; measure the loss, or pass a callable."
            )
        return target.argmax(-1), kept


@register_loss(functional.cross_entropy)
def parse_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> CrossEntropyLoss:
    """Read a call of ``F.cross_entropy``; the arguments are its own.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if the logits are one unbatched example, or targets or weights cannot be used.
    """
    if input.dim() < 2:
        raise LossCaptureError(
            f"Got logits of shape {tuple(input.shape)}: one example without a batch dimension. Accepted are "
            "(B, C), (B, C, d1, ...) and (B * T, C): keep the batch dimension."
        )
    if target.shape == input.shape:
        constant("sum of target probabilities", target.detach().sum(1), non_negative=True)
    if weight is not None:
        constant("class weight", weight, non_negative=True)
    return CrossEntropyLoss(
        outputs=input,
        targets=constant("target", target),
        num_examples=input.shape[0],
        reduction=reduction,
        class_weights=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


@register_loss(functional.nll_loss)
def parse_nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> CrossEntropyLoss:
    """Read a call of ``F.nll_loss`` as a cross-entropy; the arguments are its own.

    Log-probabilities serve as logits, because ``log_softmax`` leaves them as they are. The curvature is then
    that of the softmax before them; the loss alone is linear in log-probabilities.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if the inputs are not log-probabilities, or targets or weights cannot be used.
    """
    loss = parse_cross_entropy(input, target, weight, ignore_index, reduction)
    excess = working(input.detach()).logsumexp(1).abs()
    kept = torch.where(target != ignore_index, excess, 0.0)
    tolerance = max(1e-4, 4 * torch.finfo(input.dtype).eps)
    if not bool((kept <= tolerance).all()):
        raise LossCaptureError(
            "F.nll_loss was called with inputs that are not log-probabilities: log(sum(exp(input))) is as "
            f"far as {kept.max().item():.4g} from 0. Accepted are normalised ones: apply F.log_softmax over "
            "dimension 1, or use F.cross_entropy on the logits."
        )
    return loss
