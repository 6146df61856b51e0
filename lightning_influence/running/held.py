"""Batches that are read once and kept, for data that many passes in a row go through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


class Held:
    """An iterable of batches that reads its source once.

    Only batches made of tensors, numbers and texts are kept, because only of these is it known whether a step
    changed them in place; after one that did, and beyond the limit, they are read anew each time.

    Args:
        source: an iterable of batches that may be repeated.
        limit: most bytes to keep.
    """

    def __init__(self, source: Iterable[Any], limit: int) -> None:
        self._source, self._limit = source, limit
        self._kept: list[Any] | None = None
        self._versions: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        """Yield every batch."""
        if self._kept is not None and self._versions == _versions(self._kept):
            yield from self._kept
            return
        self._kept = None
        batches: list[Any] = []
        versions: list[int] = []
        free = self._limit
        for batch in self._source:
            tensors = _tensors(batch)
            free = free - sum(tensor.nbytes for tensor in tensors) if tensors is not None else -1
            if free >= 0:
                batches.append(batch)
                versions += [tensor._version for tensor in tensors or []]
            else:
                batches = []
            yield batch
        if free >= 0:
            self._kept, self._versions = batches, versions


def _versions(batches: list[Any]) -> list[int]:
    return [tensor._version for batch in batches for tensor in _tensors(batch) or []]


def _tensors(item: Any) -> list[Tensor] | None:
    """Return the tensors of a batch; None if it holds anything whose changes are not seen."""
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, int | float | str | bytes | None):
        return []
    if isinstance(item, Mapping):
        item = list(item.values())
    if not isinstance(item, list | tuple):
        return None
    found: list[Tensor] = []
    for part in item:
        tensors = _tensors(part)
        if tensors is None:
            return None
        found += tensors
    return found
