"""Batches in another order, and parts of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_influence.model.batches.ragged import Rows, find_rows, select_rows
from lightning_influence.support.batches import (
    MOST_DEPTH,
    ExampleList,
    find_tensors,
    has_lists,
    is_list_of_examples,
    open_part,
)
from lightning_influence.support.errors import UnsupportedDataError

Layout = Mapping[int, int | None]
"""Tensors by their number in the batch -> the dimension of their examples, None if they hold none."""

# Readings of a batch that are tried before its examples are taken for coupled.
_MOST_LAYOUTS = 24


class UnknownPartError(UnsupportedDataError):
    """A part of a batch of which it is not known how it belongs to the examples."""

    def __init__(self) -> None:
        super().__init__(
            "A batch has to be taken apart into its examples, and how it holds them is not known. Accepted "
            "are tensors with the examples in the first or second dimension, lists with an entry an example, "
            "and rows that an index gives to examples. Otherwise define `influence_loss(batch) -> (B,)` on "
            "the module."
        )


def rearranged(batch: Any, order: Sequence[int], count: int, layout: Layout | None = None) -> Any:
    """Return a copy of a batch with its examples in another order, or with some of them.

    Args:
        batch: tensors in any nesting of lists, tuples, mappings and objects. Tensors of ``count`` rows, or
            else of ``count`` columns (time-first ones), hold the examples in these; rows that belong to the
            examples by an index, as those of graphs, go with them (see
            :mod:`~lightning_influence.model.batches.ragged`); other tensors belong to all. A list of one
            thing an example is rearranged itself.
        order: positions of the examples; may be fewer than there are.
        count: number of examples ``B``.
        layout: where single tensors hold their examples, if it is not as above.

    Returns:
        The rearranged batch.

    Raises:
        UnknownPartError: if nothing in the batch holds its examples.
    """
    work = _Rearranging(batch, order, count, layout or {})
    result = work.rearrange(batch)
    if not work.moved:
        raise UnknownPartError
    return result


def find_layouts(batch: Any, count: int) -> Iterator[dict[int, int | None]]:
    """Find the ways in which a batch may be read.

    A tensor may have as many rows as there are examples by chance: class weights, or a mask of time steps.
    Where all tensors are square, nothing tells rows from columns, and only rows are tried.

    Args:
        batch: the batch.
        count: number of examples ``B``.

    Yields:
        The usual reading, then others in which one tensor, or two, hold examples elsewhere or not at all.
    """
    options: list[tuple[int, int | None]] = []
    tensors = find_tensors(batch)
    certain = any(count in tensor.shape[:1] and count not in tensor.shape[1:2] for tensor in tensors)
    by_index = find_rows(tensors, count)
    for number, tensor in enumerate(tensors):
        if count in tensor.shape[:1]:
            options += [(number, 0)] if number in by_index else []
            options.append((number, None))
            if certain and count in tensor.shape[1:2]:
                options.append((number, 1))
        elif count in tensor.shape[1:2]:
            options.append((number, None))
    pairs = (dict(pair) for pair in itertools.combinations(options, 2) if pair[0][0] != pair[1][0])
    others = itertools.chain(({n: dim} for n, dim in options), pairs)
    yield {}
    yield from itertools.islice(others, _MOST_LAYOUTS)


class _Rearranging:
    """One walk through a batch."""

    def __init__(self, batch: Any, order: Sequence[int], count: int, layout: Layout) -> None:
        self.order, self.count, self.layout = list(order), count, layout
        tensors = find_tensors(batch)
        self.rows: dict[int, Rows] = find_rows(tensors, count)
        self.owners = {len(rows.owners): rows.owners for rows in self.rows.values()}
        self.moved = False
        self._numbers = itertools.count()

    def rearrange(self, part: Any, depth: int = MOST_DEPTH) -> Any:
        if isinstance(part, Tensor):
            return self._rearrange_tensor(part, next(self._numbers))
        if isinstance(part, PackedSequence):
            return self._rearrange_packed(part)
        if callable(getattr(part, "get_example", None)) and hasattr(type(part), "from_data_list"):
            return self._rearrange_graphs(part)
        if isinstance(part, np.ndarray) and part.ndim and len(part) == self.count:
            return part[self.order]
        opened = open_part(part) if depth else None
        if opened is None:
            return part
        if isinstance(part, list | tuple) and len(part) == self.count and self._is_ragged(part):
            for _ in find_tensors(opened.parts):
                next(self._numbers)
            self.moved = self.moved or bool(find_tensors(opened.parts))
            return opened.close([part[position] for position in self.order])
        parts = [self.rearrange(item, depth - 1) for item in opened.parts]
        if self.rows and not isinstance(part, Mapping | list | tuple):
            # Objects that hold graphs say how many there are.
            parts = [len(self.order) if _is_number(item, self.count) else item for item in parts]
        same = all(new is old for new, old in zip(parts, opened.parts, strict=True))
        return part if same else opened.close(parts)

    def _rearrange_tensor(self, part: Tensor, number: int) -> Tensor:
        if part.layout != torch.strided:
            raise UnknownPartError
        if number in self.layout:
            dim = self.layout[number]
            return part if dim is None else self._select(part, dim)
        for dim in (0, 1):
            if part.ndim > dim and part.shape[dim] == self.count and number not in self.rows:
                return self._select(part, dim)
        if number in self.rows:
            self.moved = True
            return select_rows(part, self.rows[number], self.order, self.owners)
        return part

    def _select(self, part: Tensor, dim: int) -> Tensor:
        self.moved = True
        return part.index_select(dim, torch.tensor(self.order, device=part.device))

    def _rearrange_packed(self, part: PackedSequence) -> PackedSequence:
        for _ in find_tensors(part):
            next(self._numbers)
        padded, lengths = pad_packed_sequence(part)
        if len(lengths) != self.count:
            raise UnknownPartError
        kept = lengths[self.order]
        padded = self._select(padded, 1)[: int(kept.max())]
        # Sequences that the user had sorted are sorted in parts of them, if these are in order.
        ascending = self.order == sorted(self.order)
        in_order = part.sorted_indices is None and ascending
        return pack_padded_sequence(padded, kept, enforce_sorted=in_order)

    def _rearrange_graphs(self, part: Any) -> Any:
        """Let a batch of graphs that can give out its graphs join some of them anew."""
        for _ in find_tensors(part):
            next(self._numbers)
        maker: Any = next(kind for kind in type(part).__mro__ if "from_data_list" in vars(kind))
        self.moved = True
        return maker.from_data_list([part.get_example(position) for position in self.order])

    def _is_ragged(self, items: Sequence[Any]) -> bool:
        """Return whether a list holds one thing an example: texts and numbers, or tensors of no batch."""
        if all(item is None or isinstance(item, str | bytes | int | float) for item in items):
            return True
        if isinstance(items, ExampleList) or all(isinstance(item, Tensor) for item in items):
            return is_list_of_examples(items, self.count)
        inner = any(has_lists(item, self.count) for item in items)
        return not inner and not any(self.count in tensor.shape[:2] for tensor in find_tensors(items))


def _is_number(item: object, count: int) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and item == count


def missing_positions(batch: Any, count: int, rows: int) -> int:
    """Return how many positions of an example the loss leaves out.

    A loss on padded sequences leaves out the same number in every batch (none, or one where targets are
    shifted). On sequences without their padding the number changes with the lengths, and only batches of
    equal lengths have rows that can be told apart.

    Args:
        batch: the batch.
        count: number of examples ``B``.
        rows: number of rows of the loss.

    Returns:
        Width of the widest tensor ``(B, T, ...)`` in the batch less the rows of an example; 0 for one row an
        example.
    """
    widths = [part.shape[1] for part in find_tensors(batch) if part.ndim > 1 and len(part) == count]
    return 0 if rows == count else max(widths, default=0) - rows // count
