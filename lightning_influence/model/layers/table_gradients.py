"""Per-example gradients of tables, whose rows are looked up and that map to as many outputs.

A table of ``V`` rows of ``D`` numbers has gradients of two kinds, which a head that shares its weight with an
embedding has at once: rows of an example that were looked up, and products of what the table maps with
the gradients of its outputs. Neither is formed, ``V D`` numbers an example, unless it has to be.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.model.layers.bases import Basis
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, LayerGradients

# Chosen by hand: bytes of looked-up rows of several vectors that are gathered at once.
_GATHERED_BYTES = 2**24


@dataclass(frozen=True)
class TableGradients(LayerGradients):
    """``g_kb = sum_r e(rows_br) values_kbr^T`` and the products beside it, of shape ``(1, V, D)``.

    Attributes:
        rows: what was looked up, ``(B, R)``; a row may come again.
        values: gradients of what was looked up, ``(K, B, R, D)``.
        products: what the table maps and the gradients of its outputs, ``G = 1``; of no position if it maps
            nothing.
    """

    rows: Tensor
    values: Tensor
    products: FactoredGradients

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What holds them."""
        return [self.values, self.products.inputs, self.products.outputs, self.rows]

    @property
    def num_seeds(self) -> int:
        """``K``."""
        return self.values.shape[0]

    @property
    def num_examples(self) -> int:
        """``B``."""
        return self.rows.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(1, V, D)``."""
        return self.products.shape

    @property
    def maps(self) -> bool:
        """Whether there are products."""
        return self.products.inputs.shape[2] > 0

    def dense(self) -> Tensor:
        """Return the gradient matrices, ``(K, B, 1, V, D)``."""
        result = self.products.dense() if self.maps else self._zeros(self.num_seeds, self.num_examples)
        index = self.rows[None, :, None, :, None].expand(*result.shape[:3], -1, self.shape[2])
        return result.scatter_add_(3, index, self.values[:, :, None])

    def dot(self, vectors: Tensor) -> Tensor:
        """Return inner products ``(K, B, V')`` with vectors ``(V', 1, V, D)``."""
        count, positions = len(vectors), self.rows.shape[1]
        found = self.values.new_zeros(self.num_seeds, self.num_examples, count)
        each = positions * count * vectors.shape[-1] * vectors.element_size()
        step = max(1, _GATHERED_BYTES // max(1, each))
        for start in range(0, self.num_examples if positions else 0, step):
            few = slice(start, start + step)
            values = self.values[:, few].transpose(0, 1).flatten(2)  # (B, K, R D)
            found[:, few] = torch.bmm(values, _look_up(vectors, self.rows[few])).transpose(0, 1)
        return found + self.products.dot(vectors) if self.maps else found

    def combine(self, weights: Tensor) -> Tensor:
        """Return sums ``(V', 1, V, D)`` over seeds and examples, with weights ``(K, B, V')``."""
        count = weights.shape[-1]
        result = self.products.combine(weights) if self.maps else self._zeros(count)
        for vector in range(count if self.rows.shape[1] else 0):
            weighted = torch.einsum("kb,kbrd->brd", weights[..., vector], self.values)
            result[vector, 0].index_add_(0, self.rows.flatten(), weighted.flatten(0, 1))
        return result

    def rotate(self, inputs: Basis | None, outputs: Basis | None) -> LayerGradients:
        """Return ``Q_out^T g Q_in``.

        In a basis of the ``V`` rows what is looked up is no row any more, but a product with a row of the
        basis, which a seed's values would need for themselves alone: those of several seeds are formed, as
        are more positions than there are rows.
        """
        positions = self.rows.shape[1] + self.products.inputs.shape[2]
        if outputs is not None and (self.num_seeds > 1 or positions > self.shape[1]):
            return DenseGradients(self.dense()).rotate(inputs, outputs)
        values = self.values if inputs is None else inputs.turn(self.values)
        rotated = self.products.rotate(inputs, outputs)
        if outputs is None:
            return TableGradients(self.rows, values, rotated)
        looked_up = outputs.whole()[:, self.rows][None]
        if not self.maps:
            return FactoredGradients(values, looked_up)
        return FactoredGradients(
            torch.cat([values, rotated.inputs], dim=2), torch.cat([looked_up, rotated.outputs], dim=3)
        )

    def sum_of_squares(self) -> Tensor:
        """Return elementwise squares summed over seeds and examples, ``(1, V, D)``."""
        total = self.products.sum_of_squares() if self.maps else self._zeros()
        squares = self._distinct.row_squares().sum(0).flatten(0, 1)
        total[0].index_add_(0, self._distinct.rows.flatten(), squares)
        return total

    def weighted_squares(self, weights: Tensor) -> Tensor:
        """Return ``sum_ij weights_ij g_ij^2``, ``(K, B)``, for weights ``(1, V, D)``."""
        distinct = self._distinct
        found = (distinct.row_squares() * weights[0][distinct.rows]).sum(dim=(2, 3))
        return found + self.products.weighted_squares(weights) if self.maps else found

    def squared_norms(self) -> Tensor:
        """Return ``||g||^2``, ``(K, B)``."""
        found = self._distinct.row_squares().sum(dim=(2, 3))
        return found + self.products.squared_norms() if self.maps else found

    def whole_moments(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return what Kronecker factors are made of where both sides are held as matrices.

        Each pair of rows that an example looked up adds to one entry of the moments of the rows.

        Returns:
            ``sum g^T g``, ``(1, D, D)``; ``sum g g^T``, ``(1, V, V)``; and ``sum |g|^2``, a scalar, over
            seeds and examples. None where they take less of formed gradients: of a table that maps as well,
            and of more positions than there are rows.
        """
        width, count = self.shape[1], self.rows.shape[1]
        if self.maps or count > width:
            return None
        rows, values = self._distinct.rows, self._distinct.values
        pairs = torch.matmul(values, values.mT).sum(0)  # (B, R, R)
        places = rows[:, :, None] * width + rows[:, None]
        wide = pairs.new_zeros(width * width).index_add_(0, places.flatten(), pairs.flatten())
        flat = values.flatten(0, 2)
        return (flat.T @ flat)[None], wide.view(1, width, width), flat.square().sum()

    def second_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what Kronecker factors of the table are made of, as if each position were an example.

        A position is an outer product ``v d^T`` of a vector over the rows with one over the columns: both
        sides' moments are weighed with the squared norm of the other side, so that rows that were looked up
        and outputs, whose sides differ in scale, add up.

        Returns:
            ``sum |v|^2 d d^T``, ``(1, D, D)``; the diagonal of ``sum |d|^2 v v^T``, ``(1, V)``; and ``sum
            |v|^2 |d|^2``, a scalar, over seeds, examples and positions.
        """
        values = self.values.flatten(0, 2)
        energies = self.values.square().sum(-1)  # (K, B, R)
        narrow = values.T @ values
        wide = self.values.new_zeros(self.shape[1])
        wide.index_add_(0, self.rows.flatten(), energies.sum(0).flatten())
        if self.maps:
            inputs, outputs = self.products.inputs[0], self.products.outputs[:, 0]
            squares = outputs.square()
            fed, pulled = inputs.square().sum(-1), squares.sum(-1)  # (B, S), (K, B, S)
            weighted = inputs * pulled.sum(0)[..., None]
            narrow = narrow + weighted.flatten(0, 1).T @ inputs.flatten(0, 1)
            wide = wide + torch.einsum("kbsv,bs->v", squares, fed)
        return narrow[None], wide[None], wide.sum()

    def weighted(self, weights: Tensor) -> TableGradients:
        """Return the gradients times a number for each example."""
        values = self.values * weights.to(self.values)[:, None, None]
        return TableGradients(self.rows, values, self.products.weighted(weights))

    def absolute(self) -> TableGradients:
        """Return the same with all factors positive."""
        return TableGradients(self.rows, self.values.abs(), self.products.absolute())

    def blank(self, num_examples: int) -> TableGradients:
        """Return zeros: no row, no position."""
        rows, values = self.rows.new_zeros(num_examples, 0), self.values[:, :, :0]
        values = values.new_zeros(self.num_seeds, num_examples, 0, self.shape[2])
        inputs, outputs = self.products.inputs, self.products.outputs
        none = FactoredGradients(
            inputs.new_zeros(1, num_examples, 0, inputs.shape[-1]),
            outputs.new_zeros(self.num_seeds, 1, num_examples, 0, outputs.shape[-1]),
        )
        return TableGradients(rows, values, none)

    def join(self, others: Sequence[LayerGradients]) -> TableGradients | None:
        """Return these and further examples, with positions of zero where some have fewer than others."""
        parts = [self, *(other for other in others if isinstance(other, TableGradients))]
        if len(parts) <= len(others):
            return None
        looked_up = max(part.rows.shape[1] for part in parts)
        mapped = max(part.products.inputs.shape[2] for part in parts)
        parts = [part.padded(looked_up, mapped) for part in parts]
        return TableGradients(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.values for part in parts], dim=1),
            FactoredGradients(
                torch.cat([part.products.inputs for part in parts], dim=1),
                torch.cat([part.products.outputs for part in parts], dim=2),
            ),
        )

    def padded(self, looked_up: int, mapped: int) -> TableGradients:
        """Return the same with as many rows and positions of products; those that are added are zero."""
        pad = torch.nn.functional.pad
        more, further = looked_up - self.rows.shape[1], mapped - self.products.inputs.shape[2]
        if not more and not further:
            return self
        products = FactoredGradients(
            pad(self.products.inputs, (0, 0, 0, further)), pad(self.products.outputs, (0, 0, 0, further))
        )
        return TableGradients(pad(self.rows, (0, more)), pad(self.values, (0, 0, 0, more)), products)

    def seeds(self, index: slice) -> TableGradients:
        """Return the gradients of some of the seeds."""
        return replace(self, values=self.values[index], products=self.products.seeds(index))

    def select(self, index: Tensor | slice) -> TableGradients:
        """Return the gradients of some of the examples."""
        return TableGradients(self.rows[index], self.values[:, index], self.products.select(index))

    def scaled(self, factor: float) -> TableGradients:
        """Return the gradients times a number."""
        if factor == 1.0:
            return self
        return replace(self, values=self.values * factor, products=self.products.scaled(factor))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TableGradients:
        """Return the gradients on another device or in another precision."""
        return TableGradients(
            self.rows.to(device), self.values.to(device, dtype), self.products.to(device, dtype)
        )

    def restrict(self, rows: Tensor) -> TableGradients:
        """Return the gradients of a part of the table.

        Args:
            rows: the rows of the part, ascending, ``(V',)``; at least one.

        Returns:
            Gradients of shape ``(1, V', D)``.
        """
        place = torch.searchsorted(rows, self.rows).clamp_max(len(rows) - 1)
        found = rows[place] == self.rows
        inputs, outputs = self.products.inputs, self.products.outputs
        products = FactoredGradients(inputs, outputs[..., rows])
        return TableGradients(place * found, self.values * found[..., None], products)

    @functools.cached_property
    def _distinct(self) -> TableGradients:
        """The same with each row of an example once; what is left over is row 0 with values of zero."""
        order = self.rows.argsort(dim=1)
        rows = self.rows.gather(1, order)
        new = torch.ones_like(rows)
        new[:, 1:] = (rows[:, 1:] != rows[:, :-1]).long()
        number = new.cumsum(1) - 1
        values = self.values.gather(2, order[None, :, :, None].expand(self.values.shape))
        summed = torch.zeros_like(values)
        summed.scatter_add_(2, number[None, :, :, None].expand(values.shape), values)
        return replace(self, rows=torch.zeros_like(rows).scatter(1, number, rows), values=summed)

    def row_squares(self) -> Tensor:
        """Return what distinct rows add to the squares of the products, ``(K, B, R, D)``."""
        if not self.maps:
            return self.values.square()
        outputs = self.products.outputs[:, 0]  # (K, B, S, V)
        index = self.rows[None, :, None].expand(*outputs.shape[:3], -1)
        products = torch.matmul(outputs.gather(3, index).mT, self.products.inputs[0])
        return (2 * products + self.values) * self.values

    def _zeros(self, *lead: int) -> Tensor:
        return self.values.new_zeros(*lead, *self.shape)


def lay_out(vectors: Tensor) -> Tensor:
    """Return vectors ``(V', 1, V, D)`` in the order in memory in which rows are gathered in one run."""
    return vectors.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def _look_up(vectors: Tensor, rows: Tensor) -> Tensor:
    """Return rows ``(B, R)`` of vectors ``(V', 1, V, D)``, as ``(B, R D, V')``."""
    columns = vectors[:, 0].permute(1, 2, 0)
    if columns.is_contiguous():
        return columns.index_select(0, rows.flatten()).view(len(rows), -1, len(vectors))
    return vectors[:, 0][:, rows].flatten(2).permute(1, 2, 0)
