"""Many matrices of one layer, held as they are or as products of low rank, and what is computed with them.

Shapes are those of :mod:`~lightning_influence.model.layers.gradients`: ``V`` matrices ``(G, D_out, D_in)``.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_influence.linalg.truncation import truncate, truncate_within
from lightning_influence.model.layers.bases import Basis
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, LayerGradients
from lightning_influence.support.long_products import multiply_long

# Chosen by hand: bytes of matrices, or of products with them, that are formed at once, whatever the memory.
_FORMED_BYTES = 2**22
# Columns of factors that gradients go through at once, and bytes of what comes out, which are read again at
# once: measured, products of 64 positions take 0.4 of the time that those with fewer columns take.
_COLUMNS, _CACHED_BYTES = 512, 2**21
# What writing and reading a number costs, in multiplications.
_FORMED = 8


class Matrices(ABC):
    """``V`` matrices of one layer."""

    @property
    @abstractmethod
    def count(self) -> int:
        """``V``."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory held, in bytes."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """Entries of one matrix, ``G D_out D_in``."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is held, by name, with ``V`` as the first dimension."""

    @abstractmethod
    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Some of the matrices as they are, ``(V, G, D_out, D_in)``."""

    @abstractmethod
    def dot(self, gradients: LayerGradients) -> Tensor:
        """Inner products ``(K, B, V)`` with gradients."""

    @abstractmethod
    def inner(self, other: Matrices) -> Tensor:
        """Inner products ``(V, W)`` with other matrices, in float64."""

    @abstractmethod
    def scaled(self, weights: Tensor) -> Matrices:
        """The matrices times numbers ``(V,)``."""

    def select(self, index: Tensor | slice) -> Matrices:
        """Return some of the matrices."""
        return make_matrices({key: tensor[index] for key, tensor in self.tensors().items()})

    def mix(self, weights: Tensor) -> Tensor:
        """Return sums ``(Q, G, D_out, D_in)`` with weights ``(Q, V)``."""
        total: Tensor | None = None
        for rows in self.runs():
            formed = self.dense(rows)
            part = weights[:, rows] @ formed.flatten(1)
            total = part if total is None else total.add_(part)
            shape = formed.shape[1:]
        assert total is not None
        return total.view(-1, *shape)

    def project(self, vectors: Tensor) -> Tensor:
        """Return inner products ``(W, V)`` with vectors ``(W, G, D_out, D_in)``."""
        flat = vectors.flatten(1)
        return torch.cat([multiply_long(flat, self.dense(rows).flatten(1).T) for rows in self.runs()], dim=1)

    def runs(self) -> Iterator[slice]:
        """Yield which matrices to form at once."""
        step = max(1, _FORMED_BYTES // (8 * self.numel))
        return (slice(start, min(start + step, self.count)) for start in range(0, max(1, self.count), step))


@dataclass(frozen=True)
class DenseMatrices(Matrices):
    """Matrices as they are.

    Attributes:
        matrices: ``(V, G, D_out, D_in)``.
    """

    matrices: Tensor

    @property
    def count(self) -> int:
        """``V``."""
        return self.matrices.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.matrices.nbytes

    @property
    def numel(self) -> int:
        """Entries of one matrix."""
        return self.matrices.shape[1:].numel()

    def tensors(self) -> dict[str, Tensor]:
        """Return what is held."""
        return {"matrices": self.matrices}

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Return some of the matrices, ``(V, G, D_out, D_in)``."""
        return self.matrices[rows]

    def dot(self, gradients: LayerGradients) -> Tensor:
        """Return inner products ``(K, B, V)``."""
        return gradients.dot(self.matrices)

    def scaled(self, weights: Tensor) -> DenseMatrices:
        """Return the matrices times numbers."""
        return DenseMatrices(self.matrices * weights.to(self.matrices)[:, None, None, None])

    def inner(self, other: Matrices) -> Tensor:
        """Return inner products ``(V, W)`` in float64."""
        own = self.matrices.flatten(1).double()
        return torch.cat([own @ other.dense(rows).flatten(1).double().T for rows in other.runs()], dim=1)


@dataclass(frozen=True)
class LowRankMatrices(Matrices):
    """Matrices ``left right^T``.

    Attributes:
        left: ``(V, G, D_out, r)``.
        right: ``(V, G, D_in, r)``.
    """

    left: Tensor
    right: Tensor

    @property
    def count(self) -> int:
        """``V``."""
        return self.left.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.left.nbytes + self.right.nbytes

    @property
    def numel(self) -> int:
        """Entries of one matrix."""
        return self.left.shape[1] * self.left.shape[2] * self.right.shape[2]

    @property
    def rank(self) -> int:
        """``r``."""
        return self.left.shape[3]

    def tensors(self) -> dict[str, Tensor]:
        """Return what is held."""
        return {"left": self.left, "right": self.right}

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Return some of the matrices, ``(V, G, D_out, D_in)``."""
        return self.left[rows] @ self.right[rows].mT

    def mix(self, weights: Tensor) -> Tensor:
        """Return sums ``(Q, G, D_out, D_in)`` with weights ``(Q, V)``, each by one product."""
        if self.numel <= sum(tensor[0].numel() for tensor in self.tensors().values()):
            return super().mix(weights)
        left = self.left.permute(1, 2, 0, 3)  # (G, D_out, V, r)
        right = self.right.permute(1, 0, 3, 2).flatten(1, 2)  # (G, V r, D_in)
        result = self.left.new_empty(len(weights), *left.shape[:2], right.shape[2])
        for own, found in zip(weights, result, strict=True):
            torch.bmm((left * own[:, None]).flatten(2), right, out=found)
        return result

    def scaled(self, weights: Tensor) -> LowRankMatrices:
        """Return the matrices times numbers."""
        return LowRankMatrices(self.left * weights.to(self.left)[:, None, None, None], self.right)

    def dot(self, gradients: LayerGradients) -> Tensor:
        """Return inner products ``(K, B, V)``, by the way of fewest operations.

        Factors of gradients go through those of the matrices; or the matrices are formed, some at a time,
        and so are the gradients where positions or matrices in great number make that cheaper.
        """
        if not isinstance(gradients, FactoredGradients):
            return self._dot_formed(gradients)
        seeds, positions = gradients.outputs.shape[0], gradients.inputs.shape[2]
        d_out, d_in, count = self.left.shape[2], self.right.shape[2], self.count
        few = max(1, min(gradients.num_examples, _FORMED_BYTES // (8 * seeds * self.numel)))
        # Operations an example, of one group.
        factors = positions * self.rank * count * (d_in + seeds * (d_out + _FORMED))
        pushed = count * d_out * (positions * (d_in + seeds) + self.rank * d_in / gradients.num_examples)
        whole = d_out * d_in * (seeds * (positions + count + _FORMED) + count * self.rank / few)
        if factors <= min(pushed, whole):
            return self._dot_factors(gradients)
        if pushed <= whole:
            return self._dot_formed(gradients)
        parts = [
            self._dot_formed(DenseGradients(gradients.select(slice(start, start + few)).dense()))
            for start in range(0, gradients.num_examples, few)
        ]
        return torch.cat(parts, dim=1)

    def _dot_formed(self, gradients: LayerGradients) -> Tensor:
        return torch.cat([gradients.dot(self.dense(rows)) for rows in self.runs()], dim=2)

    def _dot_factors(self, gradients: FactoredGradients) -> Tensor:
        groups, examples, positions, _ = gradients.inputs.shape
        seeds = gradients.outputs.shape[0]
        result = gradients.outputs.new_zeros(seeds, examples, self.count)
        step = max(1, _COLUMNS // self.rank)
        for group, start in itertools.product(range(groups), range(0, self.count, step)):
            rows = slice(start, start + step)
            right = self.right[rows, group].transpose(0, 1).flatten(1)  # (D_in, V r)
            left = self.left[rows, group].transpose(0, 1).flatten(1)
            pushed: Tensor = gradients.inputs[group].flatten(0, 1) @ right
            pushed = pushed.view(examples, positions, -1)
            few = max(1, _CACHED_BYTES // max(1, seeds * pushed[:1].nbytes))
            for first in range(0, examples, few):
                some = slice(first, first + few)
                outputs = gradients.outputs[:, group, some].flatten(0, 2)  # (K B R, D_out)
                products = (outputs @ left).view(seeds, -1, *pushed.shape[1:]).mul_(pushed[some])
                summed = products.sum(dim=2).view(seeds, -1, pushed.shape[2] // self.rank, self.rank)
                result[:, some, rows] += summed.sum(dim=3)
        return result

    def inner(self, other: Matrices) -> Tensor:
        """Return inner products ``(V, W)`` in float64; those of the factors first where both are products."""
        if not isinstance(other, LowRankMatrices):
            return other.inner(self).T
        result = self.left.new_zeros(self.count, other.count, dtype=torch.float64)
        each = 16 * self.rank * other.count * other.rank
        step = max(1, _FORMED_BYTES // max(1, each))
        for group in range(self.left.shape[1]):
            theirs = other._columns(group)
            for start in range(0, self.count, step):
                rows = slice(start, start + step)
                mine = self._columns(group, rows)
                products = (mine[0] @ theirs[0].T).double() * (mine[1] @ theirs[1].T).double()
                result[rows] += products.view(-1, self.rank, other.count, other.rank).sum(dim=(1, 3))
        return result

    def _columns(self, group: int, rows: slice = slice(None)) -> list[Tensor]:
        """Return the columns of both factors of one group, ``(V r, D_out)`` and ``(V r, D_in)``."""
        return [factor[rows, group].mT.flatten(0, 1) for factor in (self.left, self.right)]


def compress(matrices: Tensor, rank: int) -> Matrices:
    """Return matrices ``(V, G, D_out, D_in)`` cut to a rank, or as they are where that takes no more."""
    d_out, d_in = matrices.shape[2:]
    if count_numbers((1, d_out, d_in), rank) >= d_out * d_in:
        return DenseMatrices(matrices)
    return LowRankMatrices(*truncate(matrices, rank))


def compress_within(matrices: Tensor, tolerance: float) -> Matrices:
    """Return matrices ``(V, G, D_out, D_in)`` in the smallest form whose relative error in norm is tolerated.

    The error is the root mean square over the matrices, which all get the same rank.
    """
    d_out, d_in = matrices.shape[2:]
    found = truncate_within(matrices, tolerance, (d_out * d_in - 1) // (d_out + d_in))
    return DenseMatrices(matrices) if found is None else LowRankMatrices(*found)


def count_numbers(shape: tuple[int, int, int], rank: int) -> int:
    """Return how many numbers :func:`compress` keeps of a matrix ``(G, D_out, D_in)``."""
    groups, d_out, d_in = shape
    return groups * min(rank * (d_out + d_in), d_out * d_in)


def join_matrices(parts: Sequence[Matrices]) -> Matrices:
    """Return matrices of one layer in order: in whole if some are, else in the largest of their ranks."""
    if any(isinstance(part, DenseMatrices) for part in parts):
        return DenseMatrices(torch.cat([part.dense() for part in parts]))
    products = [part for part in parts if isinstance(part, LowRankMatrices)]
    rank = max(part.rank for part in products)
    factors = ([part.left for part in products], [part.right for part in products])
    left, right = (
        torch.cat([functional.pad(factor, (0, rank - factor.shape[3])) for factor in side])
        for side in factors
    )
    return LowRankMatrices(left, right)


def turn_columns(factor: Tensor, basis: Basis | None) -> Tensor:
    """Return ``Q^T f`` of factors ``(V, G, D, r)``, those of all matrices in one product a group.

    Args:
        factor: one of the two of each matrix.
        basis: ``Q``; None for the identity.
    """
    if basis is None:
        return factor
    count, groups, width, rank = factor.shape
    columns = factor.permute(1, 2, 0, 3).flatten(2)  # (G, D, V r)
    turned = basis.turn_columns(columns).view(groups, width, count, rank)
    return turned.permute(2, 0, 1, 3).contiguous()


def make_matrices(tensors: Mapping[str, Tensor]) -> Matrices:
    """Return the matrices that :meth:`Matrices.tensors` told."""
    if "matrices" in tensors:
        return DenseMatrices(tensors["matrices"])
    return LowRankMatrices(tensors["left"], tensors["right"])


def draw_rank_one(
    shapes: Mapping[str, tuple[int, int, int]], count: int, seed: int, like: Tensor
) -> dict[str, Matrices]:
    """Draw probes ``w = a b^T`` of random signs in every layer: ``E[(w^T r)^2] = ||r||^2``.

    They take next to no memory, and products with them next to no time. The relative variance of ``(w^T
    r)^2`` is up to 8, where all of ``r`` is one matrix of rank one, in place of 2 with a sign of its own for
    every entry: so four times as many are needed at worst.

    Args:
        shapes: ``(G, D_out, D_in)`` of each layer.
        count: how many.
        seed: of the signs, which are drawn on the CPU and so the same on every device.
        like: a tensor of the device and precision.

    Returns:
        By layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(*size: int) -> Tensor:
        drawn = torch.randint(0, 2, size, generator=generator, dtype=torch.int8)
        return drawn.to(like.device, like.dtype).mul_(2).sub_(1)

    return {
        name: LowRankMatrices(signs(count, groups, d_out, 1), signs(count, groups, d_in, 1))
        for name, (groups, d_out, d_in) in shapes.items()
    }
