"""A Krylov subspace beside a space whose products are not held, but can be computed for any vector in it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_influence.linalg.block_krylov import Subspace
from lightning_influence.linalg.galerkin import GalerkinInverse


class ImplicitSpace(Protocol):
    """``span(Q)`` for ``m`` directions of any length, dependent or not."""

    @property
    def small(self) -> Tensor:
        """``Q^T A Q``, ``(m, m)`` in float64."""
        ...

    def project(self, vectors: Tensor) -> Tensor:
        """``Q^T v`` of vectors ``(V, P)``, ``(V, m)``."""
        ...

    def combine(self, weights: Tensor) -> Tensor:
        """``Q w`` of weights ``(V, m)``, ``(V, P)``."""
        ...

    def multiply(self, weights: Tensor) -> Tensor:
        """``A Q w`` of weights ``(V, m)``, ``(V, P)``; this may take a pass over the data."""
        ...


class EnlargedSubspace(Subspace):
    """The sum of an implicit space and an orthonormal basis in blocks, and the Galerkin solution in it.

    Every remainder takes a product of the implicit part, of as many vectors as there are right-hand sides.
    Before the first block is added nothing is solved, so that the first remainder is free.

    Args:
        vectors: the right-hand sides ``(V, P)``.
        outer: the implicit space.
    """

    def __init__(self, vectors: Tensor, outer: ImplicitSpace) -> None:
        super().__init__(vectors)
        self._outer = outer
        self._cross = outer.small.new_zeros(len(outer.small), 0)  # Q^T A F
        self._outer_right = outer.project(vectors).T.double()
        self._outer_coordinates = self._outer_right.new_zeros(len(vectors), len(outer.small))

    @property
    def size(self) -> int:
        """Number of directions."""
        return super().size + len(self._cross)

    def add(self, fresh: Tensor, image: Tensor) -> None:
        """Take in directions ``(k, P)``, orthonormal among those added, with their products; solve anew."""
        super().add(fresh, image)
        self._cross = torch.cat([self._cross, self._outer.project(image).T.double()], dim=1)
        top = torch.cat([self._outer.small, self._cross], dim=1)
        matrix = torch.cat([top, torch.cat([self._cross.T, self._small], dim=1)])
        right = torch.cat([self._outer_right, self._right])
        solved, size = GalerkinInverse(matrix, self.vectors.dtype).solve(right.T), len(self._cross)
        self._outer_coordinates, self._coordinates = solved[:, :size], solved[:, size:]

    def compute_remainder(self) -> Tensor:
        """Return ``V - A X``, ``(V, P)``."""
        result = super().compute_remainder()
        if len(self._small):
            result -= self._outer.multiply(self._outer_coordinates).to(result.dtype)
        return result

    def compute_solutions(self) -> Tensor:
        """Return ``X``, ``(V, P)``."""
        return super().compute_solutions() + self._outer.combine(self._outer_coordinates)
