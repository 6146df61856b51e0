"""What losses that act on each output element by itself share: their output curvature is diagonal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.model.losses.loss import OutputLoss, working


@dataclass(frozen=True, eq=False)
class ElementwiseLoss(OutputLoss):
    """A sum of one term for each of the ``d`` output elements of an example, divided by ``d`` for means.

    Attributes:
        element_weights: factor of each element's term, in the shape of the outputs, or None.
    """

    element_weights: Tensor | None = None

    @abstractmethod
    def curvature(self) -> Tensor:
        """Second derivative of ``per_example()`` in each output element, in the shape of the outputs."""

    def weights(self) -> Tensor:
        """Return ones, shape ``(B,)``, since the mean is taken within :meth:`per_example`."""
        return self.ones()

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

    @property
    def unit(self) -> float:
        """Factor of each element's term in :meth:`per_example`: ``1 / d`` for means, 1 for sums."""
        return 1 / self.num_columns if self.divides_by_positions else 1.0
