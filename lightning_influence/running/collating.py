"""Collate functions of users: whether they keep the examples in their order, and apart."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, unpack_sequence
from torch.utils.data import default_collate

from lightning_influence.running.generators import preserve_generators
from lightning_influence.support.batches import MOST_DEPTH, find_tensors, mark_lists, open_part
from lightning_influence.support.errors import UnsupportedDataError
from lightning_influence.support.notes import warn
from lightning_influence.support.random_states import preserve_rng


class OrderedCollate:
    """A user's collate function that is also given its first batch in reverse order.

    Args:
        collate: the function.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate
        self._checked = collate is default_collate
        self._lists: list[tuple[int, ...]] = []  # places of lists that only their growth tells

    def __call__(self, items: Any) -> Any:
        """Collate a batch.

        Returns:
            What the user's function returns.

        Raises:
            UnsupportedDataError: if the function puts the examples into an order of its own.
        """
        if self._checked or not isinstance(items, list) or len(items) < 2:
            return mark_lists(self._collate(items), self._lists)
        reverse, longer = self._try_out(items[::-1]), self._try_out([*items, items[0]])
        self._warn_of_mixing(items, longer)
        batch = self._collate(items)
        self._checked = True
        if _has_own_order(batch, reverse, longer, len(items)):
            name = getattr(self._collate, "__name__", type(self._collate).__name__)
            raise UnsupportedDataError(
                f"collate_fn={name} brings the examples of a batch into an order of its own: which row is "
                "which example of the dataset cannot be told. Pass a loader whose collate_fn keeps the order "
                "(to pack sequences, use pack_padded_sequence(enforce_sorted=False))."
            )
        self._lists = list(_find_lists(batch, longer, len(items)))
        return mark_lists(batch, self._lists)

    def _try_out(self, items: list[Any], seed: int | None = None) -> Any:
        """Collate a copy of items and put the random states back; None if that fails."""
        try:
            with preserve_rng(), preserve_generators(self._collate):
                if seed is not None:
                    torch.manual_seed(seed)
                    random.seed(seed)
                    np.random.seed(seed)
                return self._collate(copy.deepcopy(items))
        except Exception:  # whatever the user's code may raise
            return None

    def _warn_of_mixing(self, items: list[Any], longer: Any) -> None:
        """Warn if an example's row changes with the other examples although the random draws are the same.

        A permutation can happen to mix the two halves of a batch within themselves, so it is drawn thrice.
        """
        half = (len(items) + 1) // 2
        replaced = items[:half] + [items[0]] * (len(items) - half)
        for seed in range(3):
            same, again, other = (self._try_out(part, seed) for part in (items, items, replaced))
            if not _depend_on_others((same, again, other), longer, half, len(items)):
                continue
            name = getattr(self._collate, "__name__", type(self._collate).__name__)
            warn(
                f"collate_fn={name} mixes examples, as mixup does, or scales them by their batch: a row is "
                "of several examples, and its score is given to one. For scores of single examples pass a "
                "loader with a collate_fn that keeps them apart."
            )
            return


def _depend_on_others(batches: tuple[Any, Any, Any], longer: Any, half: int, count: int) -> bool:
    """Tell whether the first rows of a batch differ in another one of which only the last examples differ.

    Args:
        batches: the batch; the same once more, where it differs, rows are random and tell nothing; and the
            batch with other examples from ``half`` on.
        longer: a batch of one example more.
        half: number of the first rows.
        count: number of examples.

    Returns:
        Whether some part of the batch does.
    """
    parts = zip(*(_parts(batch, count, longer) for batch in batches), strict=False)
    return any(
        rows.shape == others.shape
        and torch.equal(rows, repeated)
        and not torch.equal(rows[:half], others[:half])
        for rows, repeated, others in parts
    )


def _has_own_order(batch: Any, reverse: Any, longer: Any, count: int) -> bool:
    """Return whether the reverse batch holds the same rows, and in no part in reverse order."""
    moved = False
    for rows, others in zip(_parts(batch, count, longer), _parts(reverse, count, longer), strict=False):
        if rows.shape != others.shape or torch.equal(rows, rows.flip(0)):
            continue
        if torch.equal(others, rows.flip(0)):
            return False
        moved |= _contents(rows) == _contents(others)
    return moved


def _parts(batch: Any, count: int, longer: Any, depth: int = MOST_DEPTH) -> Iterator[Tensor]:
    """The tensors of a batch with one row for each example; columns of a time-first one become its rows.

    Of several dimensions of that size, the one that is longer in a batch of one example more is meant.

    A list that has one entry more in a batch of one example more is of the examples: its rows are numbers
    that stand for the entries.
    """
    if isinstance(batch, Tensor) and batch.layout == torch.strided:
        dims = [dim for dim in (0, 1) if batch.shape[dim : dim + 1] == (count,)]
        grown = [dim for dim in dims if isinstance(longer, Tensor) and longer.shape[dim] == count + 1]
        for dim in (grown or dims)[:1]:
            yield batch.transpose(0, dim)
        return
    if isinstance(
        batch, PackedSequence
    ):  # in which rows an example stands depends on the other ones' lengths
        batch, longer = (_unpack(part) for part in (batch, longer))
    if _lists_examples(batch, longer, count):
        yield torch.tensor([hash(tuple(map(_contents, find_tensors(entry)))) for entry in batch])
        return
    opened, others = (open_part(part) if depth else None for part in (batch, longer))
    if opened is None:
        return
    same = others is not None and len(others.parts) == len(opened.parts)
    for part, other in zip(opened.parts, others.parts if others and same else [None] * len(opened.parts)):  # noqa: B905
        yield from _parts(part, count, other, depth - 1)


def _unpack(part: Any) -> list[Tensor] | None:
    """Return the sequences of a packed sequence, in the order of the batch; None for anything else."""
    return unpack_sequence(part) if isinstance(part, PackedSequence) else None


def _lists_examples(batch: Any, longer: Any, count: int) -> bool:
    """Return whether a part of a batch is a list with an entry for each example, given one of one more."""
    return (
        all(isinstance(part, list | tuple) for part in (batch, longer))
        and (len(batch), len(longer)) == (count, count + 1)
        and all(find_tensors(entry) for entry in batch)
    )


def _find_lists(batch: Any, longer: Any, count: int, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Yield where a batch holds lists with an entry for each example, as numbers of parts within parts."""
    if _lists_examples(batch, longer, count):
        yield path
        return
    opened, others = (open_part(part) if len(path) < MOST_DEPTH else None for part in (batch, longer))
    if opened is not None and others is not None:
        for number, (part, other) in enumerate(zip(opened.parts, others.parts, strict=False)):
            yield from _find_lists(part, other, count, (*path, number))


def _contents(rows: Tensor) -> tuple[bytes, ...]:
    """Return the rows as bytes, in an order that depends on them alone."""
    flat = rows.detach().cpu().reshape(len(rows) if rows.ndim else 1, -1).contiguous()
    return tuple(sorted(row.view(torch.uint8).numpy().tobytes() for row in flat))
