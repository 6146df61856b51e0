"""Whether a collate function keeps the order of the examples it is given.

Row ``b`` of a batch is taken for the ``b``-th of its indices. A ``collate_fn`` that sorts sequences by their
length, as packing them asks for, would have every score given to another example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_influence.errors import UnsupportedDataError
from lightning_influence.host.random_states import preserved_rng


class OrderedCollate:
    """A user's collate function that is also given its first batch in reverse order.

    Args:
        collate: the function.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate
        self._checked = collate is default_collate

    def __call__(self, items: Any) -> Any:
        """Collate a batch.

        Returns:
            What the user's function returns.

        Raises:
            UnsupportedDataError: if the function puts the examples into an order of its own.
        """
        if self._checked or not isinstance(items, list) or len(items) < 2:
            return self._collate(items)
        reverse = self._reversed(items)
        batch = self._collate(items)
        self._checked = True
        if _has_own_order(batch, reverse, len(items)):
            name = getattr(self._collate, "__name__", type(self._collate).__name__)
            raise UnsupportedDataError(
                f"collate_fn={name} brings the examples of a batch into an order of its own: which row is "
                "which example of the dataset cannot be told. Pass a loader whose collate_fn keeps the order "
                "(to pack sequences, use pack_padded_sequence(enforce_sorted=False))."
            )
        return batch

    def _reversed(self, items: list[Any]) -> Any:
        """Return the batch of the items in reverse order, None if that cannot be had."""
        try:
            with preserved_rng():
                return self._collate(copy.deepcopy(items[::-1]))
        except Exception:  # whatever the user's code may raise
            return None


def _has_own_order(batch: Any, reverse: Any, count: int) -> bool:
    """Return whether the reverse batch holds the same rows, and in no part in reverse order."""
    moved = False
    for rows, others in zip(_parts(batch, count), _parts(reverse, count), strict=False):
        if rows.shape != others.shape or torch.equal(rows, rows.flip(0)):
            continue
        if torch.equal(others, rows.flip(0)):
            return False
        moved |= _contents(rows) == _contents(others)
    return moved


def _parts(batch: Any, count: int) -> Iterator[Tensor]:
    """The tensors of a batch with one row for each example; columns of a time-first one become its rows."""
    if isinstance(batch, Tensor) and batch.layout == torch.strided:
        for dim in (0, 1):
            if batch.ndim > dim and batch.shape[dim] == count:
                yield batch.transpose(0, dim)
                return
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _parts(part, count)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _parts(part, count)


def _contents(rows: Tensor) -> list[bytes]:
    """Return the rows as bytes, in an order that depends on them alone."""
    flat = rows.detach().cpu().reshape(len(rows), -1).contiguous()
    return sorted(row.view(torch.uint8).numpy().tobytes() for row in flat)
