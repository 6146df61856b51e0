"""Per-example gradients of one tensor, as the operations that use it make them.

Shapes: ``K`` seeds (backward passes) share one forward pass of ``B`` examples; ``shape`` is the tensor's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor


class Part(ABC):
    """What one use contributes to the gradients of a tensor."""

    shape: torch.Size

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients, ``(K, B, *shape)``."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """The sum over seeds and examples with weights ``(K, B)``, of the tensor's shape."""

    @abstractmethod
    def bound(self, weights: Tensor) -> Tensor:
        """An upper bound, without cancellation, on the norm of what :meth:`combine` adds up; a number."""


@dataclass(frozen=True)
class Dense(Part):
    """Gradients as they are.

    Attributes:
        values: ``(K, B, *shape)``.
    """

    values: Tensor

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The tensor's shape."""
        return self.values.shape[2:]

    def dense(self) -> Tensor:
        """Return the gradients."""
        return self.values

    def combine(self, weights: Tensor) -> Tensor:
        """Return the weighted sum."""
        return torch.einsum("kb,kb...->...", weights.to(self.values), self.values)

    def bound(self, weights: Tensor) -> Tensor:
        """Return the sum of the norms of the weighted gradients."""
        return torch.einsum(
            "kb,kb->",
            weights.to(self.values).abs(),
            self.values.reshape(*self.values.shape[:2], -1).norm(dim=2),
        )


@dataclass(frozen=True)
class Product(Part):
    """Gradients of a matrix that maps inputs to outputs: ``sum_r outputs_r inputs_r^T`` in ``G`` groups.

    The matrix ``(G, D_out, D_in)`` holds the tensor's elements: ``sizes`` are its dimensions taken apart, in
    their order, and ``order`` puts these into the order of the tensor's.

    Attributes:
        inputs: ``(G, B, R, D_in)``.
        outputs: ``(K, G, B, R, D_out)``.
        shape: of the tensor.
        sizes: factors of ``G``, ``D_out`` and ``D_in``; as the matrix is if None.
        order: of the factors in the tensor; as in the matrix if None.
    """

    inputs: Tensor
    outputs: Tensor
    shape: torch.Size
    sizes: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

    def dense(self) -> Tensor:
        """Return the gradients."""
        product = torch.matmul(self.outputs.transpose(-1, -2), self.inputs)  # (K, G, B, D_out, D_in)
        return self._arrange(product.transpose(1, 2))

    def combine(self, weights: Tensor) -> Tensor:
        """Return the weighted sum, without forming a gradient."""
        weighted = torch.einsum("kb,kgbro->gbro", weights.to(self.outputs), self.outputs)
        matrix = torch.bmm(weighted.flatten(1, 2).transpose(1, 2), self.inputs.flatten(1, 2))
        return self._arrange(matrix)

    def bound(self, weights: Tensor) -> Tensor:
        """Return the sum over positions of the products of their norms."""
        left, right = self.outputs.norm(dim=-1), self.inputs.norm(dim=-1)
        return torch.einsum("kb,kgbr,gbr->", weights.abs().to(left), left, right)

    def swap(self) -> Product:
        """Return the gradients of the transpose of a matrix.

        Raises:
            ValueError: if the tensor is no matrix.
        """
        sizes, order = self._axes()
        if len(order) != 2:
            raise ValueError(f"only a matrix has a transpose, not a tensor of shape {tuple(self.shape)}")
        shape = torch.Size((self.shape[1], self.shape[0]))
        return replace(self, shape=shape, sizes=sizes, order=(order[1], order[0]))

    def is_plain(self) -> bool:
        """Return whether the tensor's rows are the rows of the matrix."""
        return self.order is None or self.order == tuple(range(len(self.order)))

    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows = self.inputs.shape[0] * self.outputs.shape[-1]
        sizes = self.sizes or (rows, self.inputs.shape[-1])
        return sizes, self.order or tuple(range(len(sizes)))

    def _arrange(self, matrix: Tensor) -> Tensor:
        """Return matrices ``(..., G, D_out, D_in)`` in the tensor's shape."""
        lead = matrix.shape[:-3]
        if not self.is_plain():
            sizes, order = self._axes()
            permuted = [*range(len(lead)), *(len(lead) + axis for axis in order)]
            matrix = matrix.reshape(*lead, *sizes).permute(permuted)
        return matrix.reshape(*lead, *self.shape)


@dataclass(frozen=True)
class Rows(Part):
    """Gradients of a table whose rows are looked up: nothing but the rows that an example looks up has any.

    Attributes:
        indices: of the rows, ``(B, R)``.
        values: gradients of what was looked up, ``(K, B, R, D)``.
        shape: of the table, ``(V, D)``.
    """

    indices: Tensor
    values: Tensor
    shape: torch.Size

    def dense(self) -> Tensor:
        """Return the gradients."""
        K, B, R, D = self.values.shape
        result = self.values.new_zeros(K, B, *self.shape)
        index = self.indices[None, :, :, None].expand(K, B, R, D)
        return result.scatter_add_(2, index, self.values)

    def combine(self, weights: Tensor) -> Tensor:
        """Return the weighted sum."""
        weighted = torch.einsum("kb,kbrd->brd", weights.to(self.values), self.values).flatten(0, 1)
        return self.values.new_zeros(self.shape).index_add_(0, self.indices.flatten(), weighted)

    def bound(self, weights: Tensor) -> Tensor:
        """Return the sum over positions of the rows' norms."""
        return torch.einsum("kb,kbr->", weights.abs().to(self.values), self.values.norm(dim=-1))

    def as_product(self) -> Product:
        """Return the same as a product of one-hot rows and gradients: positions of a head with this table.

        In a head the table maps ``D`` inputs to ``V`` outputs, and the outputs carry the seeds. Here the
        gradients do, which stand on the inputs' side: each seed has positions of its own.
        """
        K, B, R, D = self.values.shape
        hot = torch.nn.functional.one_hot(self.indices, self.shape[0]).to(self.values)  # (B, R, V)
        inputs = self.values.permute(1, 0, 2, 3).reshape(1, B, K * R, D)
        own = torch.eye(K, dtype=hot.dtype, device=hot.device)
        outputs = torch.einsum("kl,brv->kblrv", own, hot).reshape(K, 1, B, K * R, -1)
        return Product(inputs, outputs, self.shape)


@dataclass(frozen=True)
class ParameterGradient:
    """Per-example gradients of one parameter: the sum of what its uses contribute.

    Attributes:
        shape: of the parameter.
        parts: the contributions, each with the example that it belongs to, or None if with all ``B`` of them.
        num_seeds: ``K``.
        num_examples: ``B``.
        like: a tensor of their precision and device.
    """

    shape: torch.Size
    parts: Sequence[tuple[Part, int | None]]
    num_seeds: int
    num_examples: int
    like: Tensor

    def dense(self) -> Tensor:
        """Return the gradients, ``(K, B, *shape)``."""
        if len(self.parts) == 1 and self.parts[0][1] is None:
            return self.parts[0][0].dense()
        result = self.like.new_zeros(self.num_seeds, self.num_examples, *self.shape)
        for part, example in self.parts:
            if example is None:
                result += part.dense()
            else:
                result[:, example] += part.dense()[:, 0]
        return result

    def combine(self, weights: Tensor) -> Tensor:
        """Return the sum over seeds and examples with weights ``(K, B)``, of the parameter's shape."""
        total = self.like.new_zeros(self.shape)
        for part, example in self.parts:
            total += part.combine(weights if example is None else weights[:, example : example + 1])
        return total

    def bound(self, weights: Tensor) -> Tensor:
        """Return an upper bound on the norm of what :meth:`combine` adds up, without cancellation."""
        total = self.like.new_zeros((), dtype=self.like.dtype.to_real())
        for part, example in self.parts:
            total += part.bound(weights if example is None else weights[:, example : example + 1])
        return total

    def _is_small_as_product(self, rows: Rows) -> bool:
        K, _, R, _ = rows.values.shape
        return K * K * R * sum(self.shape) <= K * prod(self.shape)

    def product(self, *, tables: bool = True) -> Product | None:
        """Return all parts as one product along the positions, or None if they are not of this form.

        Args:
            tables: whether tables that are looked up and used as a head as well are made products where that
                takes fewer numbers; their inputs then hold gradients.
        """
        if all(isinstance(part, Rows) for part, _ in self.parts):
            return None  # one-hot rows of a table are best left what they are
        products, own = [], []
        for part, example in self.parts:
            if isinstance(part, Rows) and tables and self._is_small_as_product(part):
                part = part.as_product()
            if not isinstance(part, Product):
                return None
            if example is None:
                products.append(part)
            else:
                own.append((part, example))
        if own:
            products.append(join_examples(own, self.num_examples))
        first = products[0]
        if any(
            part._axes() != first._axes() or part.inputs.shape[0] != first.inputs.shape[0]
            for part in products
        ):
            return None
        if len(products) == 1:
            return first
        inputs = torch.cat([part.inputs for part in products], dim=2)
        return replace(first, inputs=inputs, outputs=torch.cat([part.outputs for part in products], dim=3))


def lay_over(
    parts: Sequence[tuple[Part, int | None]], owners: Sequence[set[int]]
) -> list[tuple[Part, int | None]]:
    """Return products of other examples each as one with no more positions than one of them has.

    Args:
        parts: with the example that each belongs to, or None if with all; others than products are kept.
        owners: the examples of each part; parts are kept where these are not told.
    """
    shared = [part for part, example in parts if example is None and isinstance(part, Product)]
    if not shared or not 2 <= len(parts) == len(owners):
        return list(parts)
    count = shared[0].inputs.shape[1]
    # A part of the batch may be one example, beside others of several.
    products = [
        part if example is None else join_examples([(part, example)], count)
        for part, example in parts
        if isinstance(part, Product)
    ]
    if len(products) < len(parts):
        return list(parts)
    present = [
        torch.tensor([n in some for n in range(count)]).to(products[0].inputs.device)[:, None, None]
        for some in owners
    ]
    most = max(part.inputs.shape[2] for part in products)

    def add(tensors: list[Tensor]) -> Tensor:
        # Rows of other examples only fill up: those of inputs are not zero.
        own = [t * mask for t, mask in zip(tensors, present, strict=True)]
        filled = [torch.nn.functional.pad(t, (0, 0, 0, most - t.shape[-2])) for t in own]
        return torch.stack(filled).sum(0)

    inputs, outputs = [part.inputs for part in products], [part.outputs for part in products]
    return [(replace(products[0], inputs=add(inputs), outputs=add(outputs)), None)]


def join_examples(products: Sequence[tuple[Product, int]], num_examples: int) -> Product:
    """Return products of one example each as one of all, filled up with positions of zeros.

    Args:
        products: each with its example, of which it holds the only one; of one form.
        num_examples: ``B``.
    """
    first = products[0][0]
    (G, _, _, d_in), (K, _, _, _, d_out) = first.inputs.shape, first.outputs.shape
    ends = [0] * num_examples
    places = []
    for product, example in products:
        start, ends[example] = ends[example], ends[example] + product.inputs.shape[2]
        places.append(slice(start, ends[example]))
    inputs = first.inputs.new_zeros(G, num_examples, max(ends), d_in)
    outputs = first.outputs.new_zeros(K, G, num_examples, max(ends), d_out)
    for (product, example), place in zip(products, places, strict=True):
        inputs[:, example, place] = product.inputs[:, 0]
        outputs[:, :, example, place] = product.outputs[:, :, 0]
    return replace(first, inputs=inputs, outputs=outputs)


def bias_part(outputs: Tensor, shape: torch.Size, present: Tensor | None = None) -> Product:
    """Return the gradients of a bias: one more input, which is 1, of outputs ``(K, G, B, R, D_out)``.

    Args:
        outputs: the output gradients.
        shape: of the bias.
        present: ``(B, R)``, 0 for positions that only fill up, whose input is 0; None if there are none.
    """
    ones = outputs.new_ones(()) if present is None else present[None, :, :, None].to(outputs)
    return Product(ones.expand(*outputs.shape[1:4], 1), outputs, shape)


def sum_to(values: Tensor, shape: torch.Size) -> Tensor:
    """Return ``(K, B, ...)`` summed to ``(K, B, *shape)`` over what the shape was broadcast along."""
    extra = values.ndim - 2 - len(shape)
    if extra:
        values = values.sum(dim=tuple(range(2, 2 + extra)))
    spread = [2 + dim for dim, size in enumerate(shape) if size == 1 and values.shape[2 + dim] != 1]
    return values.sum(dim=spread, keepdim=True) if spread else values
