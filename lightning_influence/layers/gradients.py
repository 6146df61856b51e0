"""Per-example gradients of one layer, and the contractions on top of them.

Shapes, on top of those in :mod:`.base`: ``K`` seeds (backward passes) share one forward pass; ``V`` is a
number of vectors, each a matrix ``(G, D_out, D_in)``; a weight or a product of an example, a seed and a
vector is ``(K, B, V)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class LayerGradients(ABC):
    """Gradients of one layer for ``B`` examples and ``K`` seeds."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """``B``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradient matrices, ``(K, B, G, D_out, D_in)``."""

    @abstractmethod
    def dot(self, vectors: Tensor) -> Tensor:
        """Inner products ``(K, B, V)`` with vectors ``(V, G, D_out, D_in)``."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """Sums ``(V, G, D_out, D_in)`` over seeds and examples, with weights ``(K, B, V)``."""

    @abstractmethod
    def rotate(self, q_in: Tensor | None, q_out: Tensor | None) -> LayerGradients:
        """``Q_out^T g Q_in`` of each gradient, for bases ``(G, D, D)`` with columns as vectors, or None."""

    @abstractmethod
    def sum_of_squares(self) -> Tensor:
        """Elementwise squares summed over seeds and examples, ``(G, D_out, D_in)``."""

    @abstractmethod
    def weighted_squares(self, weights: Tensor) -> Tensor:
        """``sum_ij weights_ij g_ij^2`` of each gradient, ``(K, B)``, for weights ``(G, D_out, D_in)``."""

    @abstractmethod
    def select(self, index: Tensor | slice) -> LayerGradients:
        """The gradients of some of the examples."""

    @abstractmethod
    def scaled(self, factor: float) -> LayerGradients:
        """The gradients times a number."""

    @abstractmethod
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LayerGradients:
        """The gradients on another device or in another precision."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory held, in bytes."""
