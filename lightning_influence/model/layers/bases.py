"""Orthonormal bases of one side of gradient matrices, which leave columns that training never showed alone.

Such columns, as of taps of a kernel that reach beyond small maps or of channels that a ReLU shut, are unit
vectors of their own: they take no multiplication, and what other data have in them stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Orthonormal vectors ``Q`` of ``D`` columns: those of the ``n`` columns seen, and unit vectors.

    Column ``j`` of ``Q`` is a unit vector where column ``j`` was not seen; the others are zero in such rows.

    Attributes:
        vectors: ``(G, n, n)``, in columns.
        seen: whether each column was, ``(D,)``; None for all.
        places: numbers of those that were, ``(n,)``; None for all.
    """

    vectors: Tensor
    seen: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def of_seen(cls, vectors: Tensor, seen: Tensor | None) -> Basis:
        """Return the basis with vectors ``(G, n, n)`` of the columns of a mask ``(D,)``; None for all."""
        return cls(vectors, seen, None if seen is None else seen.nonzero().flatten())

    @property
    def mT(self) -> Basis:  # noqa: N802
        """The way back."""
        return replace(self, vectors=self.vectors.mT)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Basis:
        """Return the basis on another device or in another precision."""
        numbers = (None if part is None else part.to(device) for part in (self.seen, self.places))
        return Basis(self.vectors.to(device, dtype), *numbers)

    def whole(self) -> Tensor:
        """Return ``Q``, ``(G, D, D)``."""
        if self.seen is None:
            return self.vectors
        unit = torch.eye(len(self.seen), dtype=self.vectors.dtype, device=self.vectors.device)
        return self.turn(unit.repeat(len(self.vectors), 1, 1))

    def turn(self, rows: Tensor) -> Tensor:
        """Return ``R Q`` of rows ``(..., G, m, D)``; for one group of any ``(..., D)``."""
        # A single group's basis as a plain matrix: all rows in one product.
        vectors = self.vectors[0] if len(self.vectors) == 1 else self.vectors
        if self.places is None:
            return rows @ vectors
        return rows.index_copy(-1, self.places, rows.index_select(-1, self.places) @ vectors)

    def turn_columns(self, columns: Tensor) -> Tensor:
        """Return ``Q^T C`` of columns ``(..., G, D, m)``."""
        if self.places is None:
            return self.vectors.mT @ columns
        part = self.vectors.mT @ columns.index_select(-2, self.places)
        return columns.index_copy(-2, self.places, part)

    def energies(self, covariance: Tensor) -> Tensor:
        """Return the diagonal ``(G, D)`` of ``Q^T C Q`` for symmetric matrices ``(G, D, D)``."""
        part = covariance if self.places is None else covariance[:, self.places][:, :, self.places]
        found = (self.vectors * (part @ self.vectors)).sum(dim=1)
        if self.places is None:
            return found
        return covariance.diagonal(dim1=1, dim2=2).index_copy(1, self.places, found)
