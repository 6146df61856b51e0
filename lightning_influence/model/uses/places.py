"""Where the examples of a batch stand in a tensor.

An operation moves the examples around: a transpose carries them to another dimension, a view folds them
with the positions of a sequence, a boolean mask keeps a different number of rows of each. A
:class:`Place` says, for one tensor, which slice belongs to which example: all that is needed to split the
tensor by examples.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """The dimension in which the examples of a tensor stand, and the example of each of its slices.

    Without ``owners`` the dimension holds ``outer * B * inner`` slices in row-major order: rows of a batch
    that was folded with its positions have ``inner = R`` (examples first) or ``outer = R`` (examples last).

    Attributes:
        dim: the dimension; None if the whole tensor belongs to one example, ``owners[0]``.
        outer: number of slices that stand before the examples within the dimension.
        inner: number of slices that stand behind them.
        owners: the example of each slice where these follow no such order; -1 for a slice of nobody.
    """

    dim: int | None
    outer: int = 1
    inner: int = 1
    owners: tuple[int, ...] | None = None

    def size(self, num_examples: int) -> int:
        """Return the size of the dimension in a batch of ``num_examples``."""
        return len(self.owners) if self.owners is not None else self.outer * num_examples * self.inner

    def slices(self) -> int:
        """Return how many slices each example has, where all have as many."""
        return self.outer * self.inner

    def is_plain(self) -> bool:
        """Return whether the first dimension holds the examples, each with its slices, in their order."""
        return self.owners is None and self.dim == 0 and self.outer == 1

    def is_uneven(self) -> bool:
        """Return whether examples have different numbers of slices."""
        return len(set(Counter(self.owners or ()).values())) > 1

    def moved(self, dim: int) -> Place:
        """Return the same order of examples in another dimension."""
        return replace(self, dim=dim)

    def owner_vector(self, num_examples: int) -> Tensor:
        """Return the example of each slice, ``(size,)``."""
        if self.owners is not None:
            return torch.tensor(self.owners)
        return torch.arange(num_examples).repeat_interleave(self.inner).repeat(self.outer)

    def row_order(self, num_examples: int) -> Tensor | None:
        """Return the slices of the first dimension by examples, in the order of these, ``(size,)``.

        Returns:
            Their numbers; None where they are in this order, or examples have different numbers of them.
        """
        if self.dim != 0 or self.is_plain():
            return None
        owners = self.owner_vector(num_examples)
        counts = Counter(owners.tolist())
        if counts.keys() != set(range(num_examples)) or len(set(counts.values())) > 1:
            return None
        return owners.argsort(stable=True)

    def holds_the_same(self, other: Place, num_examples: int) -> bool:
        """Return whether another place has the same examples in the same slices, however it is written."""
        if self == other or self.dim != other.dim or self.dim is None:
            return self == other
        return self.owner_vector(num_examples).equal(other.owner_vector(num_examples))

    def row_owners(self, rows: int, num_examples: int) -> Tensor | None:
        """Return the example of each slice of the first dimension, ``(rows,)``; None where some is nobody's.

        Args:
            rows: size of that dimension.
            num_examples: ``B``.
        """
        if self.dim is None and self.owners is not None:
            return torch.full((rows,), self.owners[0])
        owners = self.owner_vector(num_examples) if self.dim == 0 else None
        return None if owners is None or len(owners) != rows or bool((owners < 0).any()) else owners

    def split(self, tensor: Tensor, num_examples: int, *, lead: int = 0, fill: bool = False) -> Tensor:
        """Split a tensor by examples.

        Args:
            tensor: with ``lead`` further dimensions before those that the place describes.
            num_examples: ``B``.
            lead: number of dimensions before.
            fill: where examples have different numbers of slices, fill up with some slice, not with zeros.

        Returns:
            ``(*lead, B, ...)``: in place of the dimension of the examples, each one's own slices.
        """
        if self.dim is None:
            assert self.owners is not None
            tensor = tensor.unsqueeze(lead)
            if num_examples == 1:
                return tensor
            shape = list(tensor.shape)
            shape[lead] = num_examples
            if fill:
                return tensor.expand(shape)
            result = tensor.new_zeros(shape)
            result.select(lead, self.owners[0]).copy_(tensor.squeeze(lead))
            return result
        dim = self.dim + lead
        if self.owners is None:
            apart = (*tensor.shape[:dim], self.outer, num_examples, self.inner, *tensor.shape[dim + 1 :])
            return tensor.reshape(apart).movedim(dim + 1, lead).flatten(dim + 1, dim + 2)
        index, present = gather_plan(self.owners, num_examples)
        index, present = index.to(tensor.device), present.to(tensor.device)
        rows = tensor.index_select(dim, index.flatten())
        rows = rows.reshape(*tensor.shape[:dim], *index.shape, *tensor.shape[dim + 1 :])
        if not fill:
            mask = present.reshape(present.shape + (1,) * (rows.ndim - dim - 2))
            rows = torch.where(mask, rows, rows.new_zeros(()))
        return rows.movedim(dim, lead)


def whole(example: int) -> Place:
    """Return the place of a tensor that belongs to one example."""
    return Place(None, owners=(example,))


def from_owners(dim: int, owners: list[int], num_examples: int) -> Place:
    """Return the place with these owners, in the regular form if they have an order."""
    if num_examples > 1 and len(owners) % num_examples == 0 and -1 not in owners:
        inner = next((at for at, owner in enumerate(owners) if owner != owners[0]), len(owners))
        if len(owners) % (inner * num_examples) == 0:
            place = Place(dim, len(owners) // (inner * num_examples), inner)
            if place.owner_vector(num_examples).tolist() == owners:
                return place
    return Place(dim, owners=tuple(owners))


def reshape_place(place: Place, old: torch.Size, new: torch.Size, num_examples: int) -> Place | None:
    """Follow the examples through an operation that keeps all elements in row-major order.

    Args:
        place: in the tensor before.
        old: its shape.
        new: the shape afterwards.
        num_examples: ``B``.

    Returns:
        The place afterwards, or None if the examples do not stand in one dimension any more.
    """
    if place.dim is None:
        return place
    before, after = prod(old[: place.dim]), prod(old[place.dim + 1 :])
    if place.owners is not None:
        return _reshape_owners(place.owners, before, after, new, num_examples)
    for dim, length in enumerate(new):
        lead, trail = prod(new[:dim]), prod(new[dim + 1 :])
        outer, inner = before * place.outer, place.inner * after
        if lead and trail and outer % lead == 0 and inner % trail == 0:
            outer, inner = outer // lead, inner // trail
            if length == outer * num_examples * inner:
                return Place(dim, outer, inner)
    return None


def _reshape_owners(
    owners: tuple[int, ...], before: int, after: int, new: torch.Size, num_examples: int
) -> Place | None:
    """Follow slices that stand in no regular order.

    Args:
        owners: the example of each.
        before: number of elements that they are repeated for by the dimensions before theirs.
        after: number of elements of each slice, by the dimensions behind.
        new: the shape afterwards.
        num_examples: ``B``.

    Returns:
        As :func:`reshape_place`.
    """
    if not (before and after and owners and prod(new)):
        return None
    shape, skipped = list(new), 0
    while shape and after % shape[-1] == 0:  # dimensions within a slice say nothing
        after //= shape.pop()
    while shape and before % shape[0] == 0:
        before //= shape.pop(0)
        skipped += 1
    values = torch.tensor(owners).repeat_interleave(after).repeat(before).reshape(shape)
    found = find_owners(values, num_examples)
    return found if found is None or found.dim is None else found.moved(found.dim + skipped)


def find_owners(values: Tensor, num_examples: int, wildcard: int = -1) -> Place | None:
    """Read a place off a tensor that holds, in each element, the example that the element belongs to.

    Args:
        values: the examples' numbers; elements of nobody are ``wildcard``.
        num_examples: ``B``.
        wildcard: what marks an element of nobody.

    Returns:
        The place, or None if the elements of some slice belong to different examples.
    """
    known = values[values != wildcard]
    if known.numel() == 0:
        return None
    first = int(known[0])
    if bool((known == first).all()):
        return whole(first)
    for dim in range(values.ndim):
        slices = values.movedim(dim, 0).reshape(values.shape[dim], -1)
        owners = slices.amax(dim=1)
        if bool(((slices == owners[:, None]) | (slices == wildcard)).all()):
            return from_owners(dim, owners.tolist(), num_examples)
    return None


@lru_cache(maxsize=64)
def gather_plan(owners: tuple[int, ...], num_examples: int) -> tuple[Tensor, Tensor]:
    """Return which slices each example has, ``(B, most)``, and which of these are not there to fill up."""
    vector = torch.tensor(owners)
    rows = [(vector == example).nonzero().flatten() for example in range(num_examples)]
    most = max(1, max(len(row) for row in rows))
    index, present = torch.zeros(num_examples, most, dtype=torch.long), torch.zeros(num_examples, most).bool()
    for example, row in enumerate(rows):
        index[example, : len(row)], present[example, : len(row)] = row, True
        index[example, len(row) :] = row[0] if len(row) else 0
    return index, present
