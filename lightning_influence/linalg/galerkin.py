"""Galerkin systems of directions that are neither orthogonal nor independent."""

from __future__ import annotations

import torch
from torch import Tensor

# Chosen by hand: an eigendecomposition of so many directions takes about a second.
_MANY = 1024


class GalerkinInverse:
    """``T^{-1}`` of a symmetric positive semidefinite ``T (m, m)``, as far as rounding tells its rank.

    Directions may be of any length, and dependent: ``T = Q^T A Q`` is scaled to a unit diagonal, and what is
    left of its spectrum below the rounding of the precision it was computed in counts as zero. Of many
    directions no spectrum is computed: what rounding adds up to is added to the diagonal.

    Args:
        matrix: ``T``, in float64.
        precision: of the vectors that it was computed from.

    Attributes:
        rank: the number of independent directions; of many, that of directions which are not zero.
    """

    def __init__(self, matrix: Tensor, precision: torch.dtype) -> None:
        scale = matrix.diagonal().clamp_min(0).rsqrt().nan_to_num(posinf=0.0)
        scaled = scale[:, None] * (matrix + matrix.T) / 2 * scale
        # Chosen by hand: four times what rounding of as many numbers of random sign adds up to.
        floor = 4 * len(matrix) ** 0.5 * torch.finfo(precision).eps
        self._scale = scale
        self._cholesky: Tensor | None = None
        if len(matrix) > _MANY:
            scaled.diagonal().add_(floor)
            factor, failed = torch.linalg.cholesky_ex(scaled)
            if not int(failed):
                self._cholesky, self.rank = factor, int((scale > 0).sum())
                return
        values, vectors = torch.linalg.eigh(scaled)
        kept = values > floor * max(1.0, float(values[-1]) if len(values) else 0.0)
        self._factor = scale[:, None] * vectors[:, kept] / values[kept].sqrt()
        self.rank = int(kept.sum())

    def solve(self, right: Tensor) -> Tensor:
        """Return ``T^{-1} y`` for rows ``y (..., m)``, in float64."""
        if self._cholesky is not None:
            flat = (right.double() * self._scale).reshape(-1, len(self._scale))
            return torch.cholesky_solve(flat.T, self._cholesky).T.reshape(right.shape) * self._scale
        solved: Tensor = right.double() @ self._factor @ self._factor.T
        return solved
