"""Gradients as the matrices they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.layers.gradients import LayerGradients


@dataclass(frozen=True)
class DenseGradients(LayerGradients):
    """Gradient matrices as they are.

    Attributes:
        matrices: ``(K, B, G, D_out, D_in)``.
    """

    matrices: Tensor

    @property
    def num_examples(self) -> int:
        """``B``."""
        return self.matrices.shape[1]

    def dense(self) -> Tensor:
        """Return the gradient matrices, ``(K, B, G, D_out, D_in)``."""
        return self.matrices

    def dot(self, vectors: Tensor) -> Tensor:
        """Return inner products ``(K, B, V)``."""
        return torch.matmul(self.matrices.flatten(2), vectors.flatten(1).T)

    def combine(self, weights: Tensor) -> Tensor:
        """Return sums ``(V, G, D_out, D_in)``."""
        summed = weights.flatten(0, 1).T @ self.matrices.flatten(2).flatten(0, 1)
        return summed.view(-1, *self.matrices.shape[2:])

    def rotate(self, q_in: Tensor | None, q_out: Tensor | None) -> DenseGradients:
        """Return ``Q_out^T g Q_in`` of each matrix."""
        return DenseGradients(rotate_matrices(self.matrices, q_in, q_out))

    def sum_of_squares(self) -> Tensor:
        """Return elementwise squares summed over seeds and examples."""
        return self.matrices.square().sum(dim=(0, 1))

    def weighted_squares(self, weights: Tensor) -> Tensor:
        """Return weighted norms ``(K, B)``."""
        return weighted_squares(self.matrices, weights)

    def select(self, index: Tensor | slice) -> DenseGradients:
        """Return the gradients of some of the examples."""
        return DenseGradients(self.matrices[:, index])

    def scaled(self, factor: float) -> DenseGradients:
        """Return the gradients times a number."""
        return self if factor == 1.0 else DenseGradients(self.matrices * factor)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DenseGradients:
        """Return the gradients on another device or in another precision."""
        return DenseGradients(self.matrices.to(device, dtype))

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.matrices.nbytes


def rotate_matrices(matrices: Tensor, q_in: Tensor | None, q_out: Tensor | None) -> Tensor:
    """Return ``Q_out^T M Q_in`` for matrices ``(..., G, D_out, D_in)``; None stands for the identity."""
    if q_in is not None:  # a single group's basis as a plain matrix: all rows in one product
        matrices = matrices @ (q_in[0] if len(q_in) == 1 else q_in)
    if q_out is not None:
        matrices = q_out.transpose(-1, -2) @ matrices
    return matrices


def weighted_squares(matrices: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_ij weights_ij g_ij^2`` over the matrix dimensions, ``(K, B)``."""
    return torch.matmul(matrices.square().flatten(2), weights.flatten())
