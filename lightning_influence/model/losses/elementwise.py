"""Losses that act on each output element by itself: their output curvature is diagonal.

One element's term is ``w t(f, y)``, where ``f`` is the output, ``y`` the target and ``w`` the element's
weight. A mean reduction divides the sum of an example's ``d`` terms by ``d``. A loss of this family states
its terms and their first and second derivatives in ``f``; all else follows here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.model.losses.draws import draw_signs
from lightning_influence.model.losses.loss import OutputLoss, working
from lightning_influence.model.losses.registry import constant
from lightning_influence.support.errors import LossCaptureError


@dataclass(frozen=True, eq=False)
class ElementwiseLoss(OutputLoss):
    """A sum of one term for each of the ``d`` output elements of an example, divided by ``d`` for means.

    Attributes:
        element_weights: factor of each element's term, broadcast to the shape of the outputs, or None.
    """

    element_weights: Tensor | None = None

    @abstractmethod
    def terms(self, outputs: Tensor) -> Tensor:
        """Each element's term without its weight, differentiable in ``outputs`` (float32 or float64)."""

    @abstractmethod
    def slopes(self) -> Tensor:
        """First derivative of :meth:`terms` in each element, detached."""

    @abstractmethod
    def bends(self) -> Tensor:
        """Curvature of :meth:`terms` in each element, detached: at least 0."""

    def per_example(self) -> Tensor:
        """Return the mean of the example's terms (their sum for sums), shape ``(B,)``, differentiable."""
        values = self._weighted(self.terms(working(self.outputs)))
        return values.reshape(self.num_examples, -1).sum(1) * self.unit

    def gradient(self) -> Tensor:
        """Return the seed of the training loss, in the shape of the outputs."""
        return self._weighted(self.slopes()) * self.unit

    def curvature(self) -> Tensor:
        """Return the diagonal of the curvature of ``per_example()``, in the shape of the outputs."""
        return self._weighted(self.bends()) * self.unit

    @property
    def num_columns(self) -> int:
        """``K = d``: one column for each output element of an example."""
        return self.outputs.numel() // self.num_examples

    def columns(self) -> Iterator[Tensor]:
        """The seeds ``sqrt(h_k) e_k`` for the diagonal ``h`` of the curvature."""
        root = self.curvature().sqrt().reshape(self.num_examples, -1)
        for k in range(self.num_columns):
            seed = torch.zeros_like(root)
            seed[:, k] = root[:, k]
            yield seed.reshape(self.outputs.shape)

    def column_energies(self) -> Tensor:
        """Return the diagonal, ``(B, K)``."""
        return self.curvature().reshape(self.num_examples, -1)

    def mix_columns(self, weights: Tensor) -> Tensor:
        """Return the root of the diagonal times the weights."""
        return self.curvature().sqrt() * weights.reshape(self.outputs.shape)

    def curvature_products(self, tangents: Tensor) -> Tensor:
        """Return the diagonal curvature times tangents ``(V, *outputs.shape)``."""
        return working(tangents) * self.curvature()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one random seed: the root of the diagonal with random signs."""
        root = self.curvature().sqrt()
        return root * draw_signs(root, generator)

    @property
    def unit(self) -> float:
        """Factor of each element's term in :meth:`per_example`: ``1 / d`` for means, 1 for sums."""
        return 1 / self.num_columns if self.divides_by_positions else 1.0

    def share(self) -> Tensor:
        """Return the derivative of the batch's loss in the sum of the elements' terms."""
        return super().share() * self.unit

    def weighted(self, coefficients: Tensor) -> Self:
        """Return the loss with its elements' terms weighed."""
        if self.element_weights is not None:
            coefficients = coefficients * self.element_weights
        return replace(self, element_weights=coefficients)

    @cached_property
    def goals(self) -> Tensor:
        """The targets in the dtype to compute in, detached."""
        return self.targets.detach().to(self.detached.dtype)

    def _weighted(self, values: Tensor) -> Tensor:
        return values if self.element_weights is None else values * self.element_weights.to(values.dtype)


def compared(name: str, input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check the arguments of a loss that compares outputs with targets, either of which may come first.

    Args:
        name: of the function, for messages.
        input: one side.
        target: the other side.
        weight: of each element, or None.

    Returns:
        Outputs and targets, of one shape with a batch dimension.

    Raises:
        LossCaptureError: if both sides depend on the parameters, the weight is negative or of another shape,
            or the targets broadcast the outputs.
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
            f"{name} compared outputs of shape {tuple(input.shape)} with targets of shape "
            f"{tuple(target.shape)}. Accepted are targets of the outputs' shape, with a batch dimension: as "
            "it is, every output meets the targets of other examples. Reshape one of them, "
            "`outputs.squeeze(-1)` for instance."
        )
    if weight is not None and weight.shape != input.shape:
        raise LossCaptureError(
            f"{name} got a weight of shape {tuple(weight.shape)} for outputs of shape "
            f"{tuple(input.shape)}. Accepted is a weight of the outputs' shape: expand it, with the outputs "
            "as the first argument."
        )
    return input, target.expand(input.shape)


def _fits(shape: torch.Size, outputs: torch.Size) -> bool:
    """Return whether a tensor of one shape expands to the other."""
    pairs = zip(reversed(shape), reversed(outputs), strict=False)
    return len(shape) <= len(outputs) and all(size in {1, full} for size, full in pairs)
