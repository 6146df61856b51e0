"""Batches in another order, and parts of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class UnknownPartError(Exception):
    """A part of a batch of which it is not known how it belongs to the examples."""


def rearranged(part: Any, order: Sequence[int], count: int) -> Any:
    """Return a copy of a batch, or of a part of one, with its examples in another order.

    Args:
        part: tensors of ``count`` rows, or else of ``count`` columns (time-first ones), numbers and texts,
            in any nesting of lists, tuples, mappings and dataclasses; a list of one thing an example is
            rearranged itself.
        order: positions of the examples; may be fewer than there are.
        count: number of examples ``B``.

    Returns:
        The rearranged part.

    Raises:
        UnknownPartError: if there is anything else in it.
    """
    if isinstance(part, Tensor):
        return _rearranged_tensor(part, order, count)
    if part is None or isinstance(part, str | bytes | int | float):
        return part
    if isinstance(part, Mapping):
        result: Any = copy.copy(part)
        for key, value in part.items():
            result[key] = rearranged(value, order, count)
        return result
    if isinstance(part, list | tuple) and not isinstance(part, PackedSequence):
        return _rearranged_items(part, order, count)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return _rearranged_fields(part, order, count)
    raise UnknownPartError


def _rearranged_fields(part: Any, order: Sequence[int], count: int) -> Any:
    """Return a copy of a dataclass, whose constructor is not called: it may do more than keep its fields."""
    result = copy.copy(part)
    for field in dataclasses.fields(part):
        object.__setattr__(result, field.name, rearranged(getattr(part, field.name), order, count))
    return result


def _rearranged_tensor(part: Tensor, order: Sequence[int], count: int) -> Tensor:
    if part.layout != torch.strided:
        raise UnknownPartError
    for dim in (0, 1):
        if part.ndim > dim and part.shape[dim] == count:
            return part.index_select(dim, torch.tensor(order, device=part.device))
    if part.ndim:
        raise UnknownPartError
    return part


def _rearranged_items(part: Any, order: Sequence[int], count: int) -> Any:
    plain = all(item is None or isinstance(item, str | bytes | int | float) for item in part)
    try:
        items = list(part) if plain else [rearranged(item, order, count) for item in part]
    except UnknownPartError:
        plain, items = True, list(part)
        if len(items) != count:
            raise
    if plain and len(items) == count:
        items = [items[position] for position in order]
    return type(part)(*items) if hasattr(part, "_fields") else type(part)(items)


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
    widths = [part.shape[1] for part in _tensors(batch) if part.ndim > 1 and len(part) == count]
    return 0 if rows == count else max(widths, default=0) - rows // count


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Mapping | list | tuple):
        for item in part.values() if isinstance(part, Mapping) else part:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        for field in dataclasses.fields(part):
            yield from _tensors(getattr(part, field.name))


def copy_tensors(batch: Any) -> Any:
    """Return a batch with copies of its tensors, in any nesting of sequences, mappings and dataclasses.

    What cannot be taken apart and put together again is returned as it is.
    """
    try:
        return apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True)
    except Exception:  # whatever a container's own constructor may raise
        return batch
