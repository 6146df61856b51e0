"""Per-example gradients of one layer, as matrices or as products, and the contractions on top of them.

``K`` seeds (backward passes) share one forward pass over ``B`` examples; ``V`` is a number of vectors, each a
matrix ``(G, D_out, D_in)``; a weight or a product of an example, a seed and a vector is ``(K, B, V)``.

The form of products of inputs and output gradients stores ``R (D_in + K D_out)`` numbers per example and is
kept when there is one position per example (the matrix has rank one, and nearly everything is cheaper without
forming it). With more positions the dense form costs one product per example and then serves any number of
vectors without the factor ``R``. Those of large tables are in :mod:`.table_gradients`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.model.layers.bases import Basis
from lightning_influence.support.long_products import multiply_long


class LayerGradients(ABC):
    """Gradients of one layer for ``B`` examples and ``K`` seeds."""

    @property
    @abstractmethod
    def tensors(self) -> Sequence[Tensor]:
        """What holds them; the first one is of their precision and device."""

    @property
    @abstractmethod
    def num_seeds(self) -> int:
        """``K``."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """``B``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(G, D_out, D_in)``."""

    @property
    def like(self) -> Tensor:
        """A tensor of their precision and device."""
        return self.tensors[0]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

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
    def rotate(self, inputs: Basis | None, outputs: Basis | None) -> LayerGradients:
        """``Q_out^T g Q_in`` of each gradient, for bases of the two sides; None for the identity."""

    @abstractmethod
    def sum_of_squares(self) -> Tensor:
        """Elementwise squares summed over seeds and examples, ``(G, D_out, D_in)``."""

    @abstractmethod
    def weighted_squares(self, weights: Tensor) -> Tensor:
        """``sum_ij weights_ij g_ij^2`` of each gradient, ``(K, B)``, for weights ``(G, D_out, D_in)``."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """``||g||^2`` of each gradient, ``(K, B)``."""

    @abstractmethod
    def absolute(self) -> LayerGradients:
        """The same with all factors positive: what is added up without cancelling."""

    @abstractmethod
    def blank(self, num_examples: int) -> LayerGradients:
        """Gradients of zero, of other examples, in a form that :meth:`join` takes without forming any."""

    @abstractmethod
    def join(self, others: Sequence[LayerGradients]) -> LayerGradients | None:
        """These and further examples in one, or None where that takes forming the matrices."""

    @abstractmethod
    def seeds(self, index: slice) -> LayerGradients:
        """The gradients of some of the seeds."""

    @abstractmethod
    def select(self, index: Tensor | slice) -> LayerGradients:
        """The gradients of some of the examples."""

    @abstractmethod
    def scaled(self, factor: float) -> LayerGradients:
        """The gradients times a number."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> LayerGradients:
        """The gradients times a number for each example, ``(B,)``."""

    @abstractmethod
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LayerGradients:
        """The gradients on another device or in another precision."""


@dataclass(frozen=True)
class DenseGradients(LayerGradients):
    """Gradient matrices as they are.

    Attributes:
        matrices: ``(K, B, G, D_out, D_in)``.
    """

    matrices: Tensor

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What holds them."""
        return [self.matrices]

    @property
    def num_seeds(self) -> int:
        """``K``."""
        return self.matrices.shape[0]

    @property
    def num_examples(self) -> int:
        """``B``."""
        return self.matrices.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, D_out, D_in)``."""
        groups, d_out, d_in = self.matrices.shape[2:]
        return groups, d_out, d_in

    def dense(self) -> Tensor:
        """Return the gradient matrices, ``(K, B, G, D_out, D_in)``."""
        return self.matrices

    def dot(self, vectors: Tensor) -> Tensor:
        """Return inner products ``(K, B, V)``."""
        return multiply_long(self.matrices.flatten(2), vectors.flatten(1).T)

    def combine(self, weights: Tensor) -> Tensor:
        """Return sums ``(V, G, D_out, D_in)``."""
        summed = weights.flatten(0, 1).T @ self.matrices.flatten(2).flatten(0, 1)
        return summed.view(-1, *self.matrices.shape[2:])

    def rotate(self, inputs: Basis | None, outputs: Basis | None) -> DenseGradients:
        """Return ``Q_out^T g Q_in`` of each matrix."""
        return DenseGradients(rotate_matrices(self.matrices, inputs, outputs))

    def sum_of_squares(self) -> Tensor:
        """Return elementwise squares summed over seeds and examples."""
        return self.matrices.square().sum(dim=(0, 1))

    def weighted_squares(self, weights: Tensor) -> Tensor:
        """Return weighted norms ``(K, B)``."""
        return weighted_squares(self.matrices, weights)

    def squared_norms(self) -> Tensor:
        """Return ``||g||^2``, ``(K, B)``."""
        return self.matrices.flatten(2).square().sum(2)

    def absolute(self) -> DenseGradients:
        """Return the matrices of absolute values."""
        return DenseGradients(self.matrices.abs())

    def blank(self, num_examples: int) -> DenseGradients:
        """Return zeros."""
        return DenseGradients(self.matrices.new_zeros(self.num_seeds, num_examples, *self.shape))

    def join(self, others: Sequence[LayerGradients]) -> DenseGradients:
        """Return these and further examples."""
        return DenseGradients(torch.cat([self.matrices, *(other.dense() for other in others)], dim=1))

    def seeds(self, index: slice) -> DenseGradients:
        """Return the gradients of some of the seeds."""
        return DenseGradients(self.matrices[index])

    def select(self, index: Tensor | slice) -> DenseGradients:
        """Return the gradients of some of the examples."""
        return DenseGradients(self.matrices[:, index])

    def scaled(self, factor: float) -> DenseGradients:
        """Return the gradients times a number."""
        return self if factor == 1.0 else DenseGradients(self.matrices * factor)

    def weighted(self, weights: Tensor) -> DenseGradients:
        """Return the gradients times a number for each example."""
        return DenseGradients(self.matrices * weights.to(self.matrices)[:, None, None, None])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DenseGradients:
        """Return the gradients on another device or in another precision."""
        return DenseGradients(self.matrices.to(device, dtype))


def rotate_matrices(matrices: Tensor, inputs: Basis | None, outputs: Basis | None) -> Tensor:
    """Return ``Q_out^T M Q_in`` for matrices ``(..., G, D_out, D_in)``; None stands for the identity."""
    if inputs is not None:
        matrices = inputs.turn(matrices)
    return matrices if outputs is None else outputs.turn_columns(matrices)


def weighted_squares(matrices: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_ij weights_ij g_ij^2`` over the matrix dimensions, ``(K, B)``."""
    return multiply_long(matrices.square().flatten(2), weights.flatten()[:, None])[..., 0]


# Largest block formed at once where only its sum or its products are wanted: it should stay in the cache,
# where it is read again at once (measured: up to twice as fast as blocks of 32 MiB).
_CHUNK_BYTES = 4 * 2**20
# The same where each block goes through many vectors, which do not fit into the cache with it: few rows at a
# time would read all vectors again and again.
_PRODUCT_BYTES = 32 * 2**20
# Gradients with one position are formed for products if so many of them fit into so much memory, and for so
# many vectors: both ways take the same operations, and the one that reads and writes less wins.
_DENSE_BYTES, _DENSE_ROWS, _DENSE_VECTORS = 32 * 2**20, 64, 128
# What writing and reading a formed number costs, in multiplications.
_FORMED = 12


@dataclass(frozen=True)
class FactoredGradients(LayerGradients):
    """``g_kb = sum_r outputs[k, :, b, r] inputs[:, b, r]^T``, never formed unless it has to be.

    Attributes:
        inputs: ``(G, B, R, D_in)``.
        outputs: ``(K, G, B, R, D_out)``.
    """

    inputs: Tensor
    outputs: Tensor

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What holds them."""
        return [self.inputs, self.outputs]

    @property
    def num_seeds(self) -> int:
        """``K``."""
        return self.outputs.shape[0]

    @property
    def num_examples(self) -> int:
        """``B``."""
        return self.inputs.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, D_out, D_in)``."""
        return self.inputs.shape[0], self.outputs.shape[-1], self.inputs.shape[-1]

    def dense(self) -> Tensor:
        """Return the gradient matrices, ``(K, B, G, D_out, D_in)``."""
        product = torch.matmul(self.outputs.transpose(-1, -2), self.inputs)  # (K, G, B, D_out, D_in)
        return product.transpose(1, 2)

    def dot(self, vectors: Tensor) -> Tensor:
        """Return inner products ``(K, B, V)``: inputs go through the vectors once, however many the seeds."""
        num, groups, d_out, d_in = vectors.shape
        examples, positions = self.inputs.shape[1:3]
        if (
            num >= _DENSE_VECTORS
            and self.outputs.shape[0] == positions == 1
            and vectors[0].nbytes <= _DENSE_BYTES // _DENSE_ROWS
        ):
            return self._dense_dot(vectors)
        if self._dense_is_cheaper(num):
            flat = vectors.flatten(1).T
            parts = [multiply_long(part._rows(), flat) for part in self._chunks(_PRODUCT_BYTES)]
            return torch.cat(parts).transpose(0, 1)
        rows = self.inputs.reshape(groups, examples * positions, d_in)
        result = self.outputs.new_zeros(self.outputs.shape[0], examples, num)
        step = _chunk(examples * positions * groups * d_out * rows.element_size(), num)
        for start in range(0, num, step):
            part = vectors[start : start + step].transpose(0, 1).reshape(groups, -1, d_in)
            pushed = torch.bmm(rows, part.transpose(1, 2)).view(groups, examples, positions, -1, d_out)
            # sum over (g, r, o) of pushed[g, b, r, v, o] outputs[k, g, b, r, o]
            left = self.outputs.permute(2, 1, 3, 0, 4)  # (B, G, R, K, D_out)
            right = pushed.permute(1, 0, 2, 4, 3)  # (B, G, R, D_out, V)
            if positions * groups == 1:
                left, right = left[:, 0, 0], right[:, 0, 0]
            products = multiply_long(left, right)
            if positions * groups > 1:
                products = products.sum(dim=(1, 2))
            result[:, :, start : start + step] = products.transpose(0, 1)
        return result

    def _dense_is_cheaper(self, num: int) -> bool:
        """Return whether products with ``num`` vectors should form the matrices first, by operations."""
        seeds, positions, d_in = self.outputs.shape[0], self.inputs.shape[2], self.inputs.shape[-1]
        formed = seeds * (positions + num + _FORMED) * d_in
        return positions > 1 and formed < num * positions * (d_in + seeds)

    def _dense_dot(self, vectors: Tensor) -> Tensor:
        """Return ``(1, B, V)`` from dense gradients, by one square product."""
        flat = vectors.flatten(1).T
        step = _DENSE_BYTES // vectors[0].nbytes
        parts = [self.select(slice(start, start + step)) for start in range(0, self.num_examples, step)]
        return torch.cat([multiply_long(part.dense()[0].flatten(1), flat) for part in parts])[None]

    def combine(self, weights: Tensor) -> Tensor:
        """Return sums ``(V, G, D_out, D_in)``: weigh the output gradients, then multiply by the inputs."""
        num = weights.shape[-1]
        seeds, groups, examples, positions, d_out = self.outputs.shape
        if self._dense_is_cheaper(num):
            few = self._chunks(_PRODUCT_BYTES)
            shares = torch.split(weights.transpose(0, 1), [some.num_examples for some in few])
            total = self.inputs.new_zeros(num, groups * d_out * self.inputs.shape[-1])
            for some, share in zip(few, shares, strict=True):
                total.addmm_(share.reshape(-1, num).T, some._rows().flatten(0, 1))
            return total.view(num, groups, d_out, -1)
        rows = self.inputs.reshape(groups, examples * positions, -1)
        result = self.inputs.new_empty(num, groups, d_out, rows.shape[-1])
        step = _chunk(examples * positions * groups * d_out * rows.element_size(), num)
        for start in range(0, num, step):
            part = weights[:, :, start : start + step]
            left = part.permute(1, 2, 0)  # (B, V, K)
            right = self.outputs.permute(2, 0, 1, 3, 4).reshape(examples, seeds, -1)  # (B, K, G R D_out)
            mixed = torch.bmm(left, right).view(examples, -1, groups, positions, d_out)
            mixed = mixed.permute(2, 1, 4, 0, 3).reshape(
                groups, -1, examples * positions
            )  # (G, V D_out, B R)
            summed = torch.bmm(mixed, rows).view(groups, -1, d_out, rows.shape[-1])
            result[start : start + step] = summed.transpose(0, 1)
        return result

    def rotate(self, inputs: Basis | None, outputs: Basis | None) -> FactoredGradients:
        """Return the rotated factors."""
        left, right = self.outputs, self.inputs
        if outputs is not None:  # examples and positions as rows of one product a group
            left = outputs.turn(left.flatten(2, 3)).view(left.shape)
        if inputs is not None:
            right = inputs.turn(right.flatten(1, 2)).view(right.shape)
        return FactoredGradients(right, left)

    def sum_of_squares(self) -> Tensor:
        """Return elementwise squares summed over seeds and examples, ``(G, D_out, D_in)``."""
        positions = self.inputs.shape[2]
        formed = self.num_seeds * (positions + _FORMED)
        if positions == 1:
            outputs = self.outputs.square().sum(dim=0)[:, :, 0]  # (G, B, D_out)
            return torch.bmm(outputs.transpose(1, 2), self.inputs.square()[:, :, 0])
        if positions * (positions + 1) // 2 <= formed:
            return self._sum_pairs()
        total = None
        for part in self._chunks():
            squares = part.dense().square_().flatten(0, 1)
            squares = squares[0] if len(squares) == 1 else squares.sum(dim=0)
            total = squares if total is None else total.add_(squares)
        assert total is not None
        return total

    def _sum_pairs(self) -> Tensor:
        """Return :meth:`sum_of_squares` from products of pairs of positions, without forming a gradient."""
        first, second = torch.triu_indices(*[self.inputs.shape[2]] * 2, device=self.inputs.device)
        counts = torch.where(first == second, 1, 2).to(self.inputs)[:, None]  # a pair stands for both orders
        groups, d_out, d_in = self.shape
        total = self.inputs.new_zeros(groups, d_out, d_in)
        each = len(first) * groups * (d_in + d_out) * total.element_size()
        step = _chunk(each, self.num_examples, _PRODUCT_BYTES)
        for start in range(0, self.num_examples, step):
            few = self.select(slice(start, start + step))
            inputs = few.inputs[:, :, first] * few.inputs[:, :, second]  # (G, B, pairs, D_in)
            outputs = (few.outputs[:, :, :, first] * few.outputs[:, :, :, second]).sum(dim=0) * counts
            total.baddbmm_(outputs.flatten(1, 2).mT, inputs.flatten(1, 2))
        return total.clamp_min_(0)  # terms of both signs leave rounding where their sum vanishes

    def weighted_squares(self, weights: Tensor) -> Tensor:
        """Return weighted norms ``(K, B)``, for one position without forming a gradient."""
        if self.inputs.shape[2] == 1:
            pushed = torch.bmm(self.inputs.square()[:, :, 0], weights.transpose(1, 2))  # (G, B, D_out)
            return (self.outputs.square()[:, :, :, 0] * pushed).sum(dim=(1, 3))
        return torch.cat([weighted_squares(part.dense(), weights) for part in self._chunks()], dim=1)

    def squared_norms(self) -> Tensor:
        """Return ``||g||^2``, ``(K, B)``: from products of positions, or of formed matrices if it is less."""
        positions, (_, d_out, d_in) = self.inputs.shape[2], self.shape
        if positions == 1:
            norms = self.outputs.square().sum(-1) * self.inputs.square().sum(-1)
            return norms.sum(dim=(1, 3))
        if positions * (d_in + d_out) <= d_in * d_out:
            gram = torch.matmul(self.outputs, self.outputs.mT) * torch.matmul(self.inputs, self.inputs.mT)
            return gram.sum(dim=(1, 3, 4))
        return torch.cat([part.dense().flatten(2).square().sum(2) for part in self._chunks()], dim=1)

    def absolute(self) -> FactoredGradients:
        """Return the same with all factors positive."""
        return replace(self, inputs=self.inputs.abs(), outputs=self.outputs.abs())

    def blank(self, num_examples: int) -> FactoredGradients:
        """Return products of zeros with as many positions."""
        groups, _, positions, d_in = self.inputs.shape
        inputs = self.inputs.new_zeros(groups, num_examples, positions, d_in)
        outputs = self.outputs.new_zeros(self.num_seeds, groups, num_examples, *self.outputs.shape[3:])
        return FactoredGradients(inputs, outputs)

    def join(self, others: Sequence[LayerGradients]) -> FactoredGradients | None:
        """Return these and further examples where all have as many positions; None elsewhere."""
        parts = [self, *(other for other in others if isinstance(other, FactoredGradients))]
        if len(parts) <= len(others) or len({part.inputs.shape[2] for part in parts}) > 1:
            return None
        inputs = torch.cat([part.inputs for part in parts], dim=1)
        outputs = torch.cat([part.outputs for part in parts], dim=2)
        return FactoredGradients(inputs, outputs)

    def seeds(self, index: slice) -> FactoredGradients:
        """Return the gradients of some of the seeds."""
        return replace(self, outputs=self.outputs[index])

    def select(self, index: Tensor | slice) -> FactoredGradients:
        """Return the gradients of some of the examples."""
        return FactoredGradients(self.inputs[:, index], self.outputs[:, :, index])

    def scaled(self, factor: float) -> FactoredGradients:
        """Return the gradients times a number."""
        return self if factor == 1.0 else replace(self, outputs=self.outputs * factor)

    def weighted(self, weights: Tensor) -> FactoredGradients:
        """Return the gradients times a number for each example."""
        return replace(self, outputs=self.outputs * weights.to(self.outputs)[:, None, None])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FactoredGradients:
        """Return the gradients on another device or in another precision."""
        return FactoredGradients(self.inputs.to(device, dtype), self.outputs.to(device, dtype))

    def _rows(self) -> Tensor:
        """Return the gradients as flat vectors ``(B, K, P_l)``: one product an example for all its seeds."""
        seeds, groups, examples, positions, d_out = self.outputs.shape
        left = self.outputs.permute(2, 1, 0, 4, 3).reshape(examples * groups, seeds * d_out, positions)
        right = self.inputs.transpose(0, 1).reshape(examples * groups, positions, -1)
        product = torch.bmm(left, right).view(examples, groups, seeds, -1)
        return product.transpose(1, 2).reshape(examples, seeds, -1)

    def _chunks(self, limit: int = _CHUNK_BYTES) -> list[FactoredGradients]:
        """Return the same gradients in runs of examples whose dense form stays small."""
        groups, examples, _, d_in = self.inputs.shape
        matrix = self.outputs.shape[0] * groups * self.outputs.shape[-1] * d_in * self.inputs.element_size()
        step = _chunk(matrix, examples, limit)
        return [self.select(slice(start, start + step)) for start in range(0, examples, step)]


def concatenate(parts: Sequence[LayerGradients]) -> LayerGradients:
    """Return several batches as one, in order: factored where all are so in one form, else dense."""
    if len(parts) == 1:
        return parts[0]
    joined = parts[0].join(parts[1:])
    return DenseGradients(torch.cat([part.dense() for part in parts], dim=1)) if joined is None else joined


def _chunk(bytes_each: int, count: int, limit: int = _CHUNK_BYTES) -> int:
    """Return how many items to form at once so that they stay within the working memory."""
    return max(1, min(count, limit // max(1, bytes_each)))


def compact(gradients: LayerGradients, *, smaller: bool = False) -> LayerGradients:
    """Return the cheaper form: dense for products of several positions, else as they are.

    Args:
        gradients: the gradients.
        smaller: keep products of several positions where these take less memory.
    """
    if not isinstance(gradients, FactoredGradients) or gradients.inputs.shape[2] == 1:
        return gradients
    if smaller:
        groups, d_out, d_in = gradients.shape
        whole = gradients.num_seeds * gradients.num_examples * groups * d_out * d_in
        if sum(tensor.numel() for tensor in gradients.tensors) < whole:
            return gradients
    return DenseGradients(gradients.dense())
