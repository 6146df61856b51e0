"""How many examples batches hold of which no loader tells it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_influence.support.batches import (
    find_chance,
    find_columns,
    find_tensors,
    guess_count,
    mark_lists,
)
from lightning_influence.support.errors import UnsupportedDataError

ACCEPTED = (
    "a DataLoader over a map-style dataset, a list or dict of them, CombinedLoader(..., 'sequential'), "
    "or a list of ready-made batches"
)


# Chosen by hand: labels of so small a chance are none.
_UNLIKELY = 1e-3


@dataclass(frozen=True)
class _Columns:
    """Lists side by side in one batch.

    Attributes:
        paths: where they are.
        entries: how many each has.
        rows: first dimension of all their tensors; None where these differ in it.
        beside: first dimensions of the batch's other tensors.
    """

    paths: list[tuple[int, ...]]
    entries: int
    rows: int | None
    beside: set[int]


class ExampleCounter:
    """Counts the examples of batches, and finds out whether lists in them have an entry for each example."""

    def __init__(self) -> None:
        self._kinds: list[str] = []
        self._guesses: list[tuple[int | None, int | None]] = []  # with an index, and without
        self._chances: list[float | None] = []
        self._columns: list[_Columns | None] = []
        self._paths: list[list[tuple[int, ...]]] = []

    def add(self, batch: Any) -> None:
        """Look at the next batch."""
        self._kinds.append(type(batch).__name__)
        self._guesses.append((guess_count(batch), guess_count(batch, by_index=False)))
        self._chances.append(find_chance(batch))
        self._columns.append(_find_columns(batch))

    def finish(self) -> list[int]:
        """Return the numbers of examples of all batches.

        Raises:
            UnsupportedDataError: if a batch holds no examples, or lists of which it cannot be told whether
                their entries are examples, or the rows of these.
        """
        columns = [found for found in self._columns if found is not None]
        if columns and len(columns) == len(self._columns):
            if not _are_examples(columns):
                return [found.rows or 0 for found in columns]
            self._paths = [found.paths for found in columns]
            return [found.entries for found in columns]
        # An index is one in all batches; class labels come in order in some.
        by_index = bool(self._chances) and None not in self._chances
        if by_index:
            _check_chance(math.prod(chance or 0.0 for chance in self._chances), self._guesses[0])
        sizes = [guesses[0] if by_index or chance == 0 else guesses[1] for guesses, chance in self._read()]
        return [_check(size, number, self._kinds[number]) for number, size in enumerate(sizes)]

    def _read(self) -> Iterable[tuple[tuple[int | None, int | None], float | None]]:
        return zip(self._guesses, self._chances, strict=True)

    def mark(self, batch: Any, number: int) -> Any:
        """Return a batch whose lists of examples are marked as such."""
        return mark_lists(batch, self._paths[number]) if self._paths else batch


def _find_columns(batch: Any) -> _Columns | None:
    groups = list(find_columns(batch))
    if len(groups) != 1:
        return None
    [(path, lists)] = groups
    inside = find_tensors(lists)
    own, rows = {id(tensor) for tensor in inside}, {tensor.shape[:1] for tensor in inside}
    return _Columns(
        [(*path, number) for number in range(len(lists))],
        len(lists[0]),
        next(iter(rows.pop()), None) if len(rows) == 1 else None,
        {len(tensor) for tensor in find_tensors(batch) if tensor.ndim and id(tensor) not in own},
    )


def _are_examples(columns: Sequence[_Columns]) -> bool:
    """Return whether the entries of lists are examples, not the rows of these.

    Raises:
        UnsupportedDataError: if that cannot be told.
    """
    if any(found.rows is None for found in columns):  # rows of examples are as many in all tensors
        return True
    by_entries = all(found.entries in found.beside and found.rows not in found.beside for found in columns)
    by_rows = all(found.rows in found.beside and found.entries not in found.beside for found in columns)
    if by_entries or by_rows:
        return by_entries
    entries, rows = {found.entries for found in columns}, {found.rows for found in columns}
    if (len(entries) > 1) != (len(rows) > 1):  # batches differ in what numbers their examples
        return len(entries) > 1
    first = columns[0]
    raise UnsupportedDataError(
        f"A ready-made batch holds lists of {first.entries} tensors, all with {first.rows} rows: it cannot "
        "be told whether the entries are the examples, or the rows of all. Accepted are tensors with the "
        "examples in their rows (join the entries with `torch.stack`), or the DataLoader that made the "
        "batch, which knows their number."
    )


def _check_chance(chance: float, guesses: tuple[int | None, int | None]) -> None:
    """Refuse an index that may be class labels.

    Raises:
        UnsupportedDataError: naming both numbers of examples.
    """
    if chance > _UNLIKELY:
        raise UnsupportedDataError(
            f"A ready-made batch holds ascending integers that may be the labels of {guesses[1]} examples, "
            f"or an index that gives rows to {guesses[0]} examples: it cannot be told. Accepted is the "
            "DataLoader that made the batch, which knows their number; graphs are known by their edges or "
            "offsets."
        )


def _check(size: int | None, position: int, kind: str) -> int:
    if not size:
        raise UnsupportedDataError(
            f"Batch {position} ({kind}) holds no tensor with examples in its first dimension. "
            f"Pass {ACCEPTED}."
        )
    return size
