"""Batches of any form: containers and objects in any nesting, taken apart and put together again."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

#: How deeply parts of a batch may be nested; objects may refer to each other in circles.
MOST_DEPTH = 8
_CLOSED = (
    str, bytes, int, float, complex, type(None), type, ModuleType, FunctionType, MethodType,
    BuiltinFunctionType, functools.partial, nn.Module, Generator,
)  # fmt: skip


class Opened:
    """A container or an object whose parts are known.

    Attributes:
        parts: its items, values or attributes.
        close: puts others in their place into a copy of it.
    """

    def __init__(self, parts: Sequence[Any], close: Callable[[Sequence[Any]], Any]) -> None:
        self.parts, self.close = list(parts), close


def open_part(part: Any) -> Opened | None:
    """Take one container or object apart.

    Known are mappings, lists, tuples and named tuples (packed sequences among them), and the attributes of
    dataclasses, of attrs and of other objects, in ``__dict__`` or in slots. Objects keep what they are
    without their constructor running again.

    Args:
        part: anything.

    Returns:
        Its parts; None for a tensor, and for anything without parts.
    """
    if isinstance(part, (Tensor, *_CLOSED)):
        return None
    if isinstance(part, Mapping):
        return Opened(list(part.values()), functools.partial(_close_mapping, part))
    if isinstance(part, list | tuple):
        kind = type(part)
        named = hasattr(part, "_fields")
        return Opened(part, lambda parts: kind(*parts) if named else kind(parts))
    names = [name for name in _find_attributes(part) if hasattr(part, name)]
    if not names:
        return None
    return Opened([getattr(part, name) for name in names], functools.partial(_close_object, part, names))


def find_tensors(batch: Any) -> list[Tensor]:
    """Return all tensors of a batch, in an order that depends on its form alone."""
    return list(_walk(batch, MOST_DEPTH))


def find_packed(batch: Any, depth: int = MOST_DEPTH) -> list[PackedSequence]:
    """Return all packed sequences of a batch."""
    if isinstance(batch, PackedSequence):
        return [batch]
    opened = open_part(batch) if depth else None
    parts = opened.parts if opened is not None else ()
    return [packed for part in parts for packed in find_packed(part, depth - 1)]


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with other tensors; containers and objects without any are the same ones.

    Args:
        batch: any nesting.
        change: maps each tensor to what takes its place.

    Returns:
        The batch.
    """
    return _map(batch, change, MOST_DEPTH)


def copy_tensors(batch: Any) -> Any:
    """Return a batch with copies of its tensors; objects that can be cloned are cloned as a whole.

    What cannot be put together again is returned as it is.
    """
    try:
        return _map(batch, Tensor.clone, MOST_DEPTH, whole=True)
    except Exception:  # whatever an object's own methods may raise
        return batch


class ExampleList(list[Any]):
    """A list of which it is known that it has an entry for each example of its batch."""


def is_list_of_examples(part: Any, count: int) -> bool:
    """Return whether a part of a batch is a list with a tensor for each of ``count`` examples.

    Args:
        part: anything.
        count: number of examples ``B``. Several tensors of one shape that have as many rows or columns are
            taken for inputs and targets of the batch, unless it is known that they are not.
    """
    if isinstance(part, ExampleList):
        return len(part) == count
    if not isinstance(part, list | tuple) or len(part) != count or count < 2:
        return False
    tensors = [item for item in part if isinstance(item, Tensor)]
    if len(tensors) < count or len({(tensor.ndim, tensor.dtype) for tensor in tensors}) > 1:
        return False
    shapes = {tensor.shape for tensor in tensors}
    of_several_lengths = len(shapes) > 1 == len({shape[1:] for shape in shapes})
    return of_several_lengths or not all(count in shape[:2] for shape in shapes)


def mark_lists(batch: Any, paths: Sequence[tuple[int, ...]]) -> Any:
    """Return a batch whose lists at some places, as numbers of parts, are known to be of examples."""
    for path in paths:
        batch = _mark(batch, path)
    return batch


def find_columns(
    part: Any, path: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], list[Sequence[Any]]]]:
    """Find lists side by side with as many entries each, as inputs and targets that are not joined.

    Args:
        part: of a batch.
        path: where it is.

    Yields:
        The place of what holds such lists and nothing else, and the lists.
    """
    opened = open_part(part) if len(path) < MOST_DEPTH else None
    if opened is None:
        return
    lists = _find_lists(opened.parts)
    if lists:
        yield path, lists
        return
    for number, item in enumerate(opened.parts):
        yield from find_columns(item, (*path, number))


def has_lists(batch: Any, count: int, depth: int = MOST_DEPTH) -> bool:
    """Return whether a batch holds a list with a tensor for each of ``count`` examples."""
    opened = open_part(batch) if depth else None
    return opened is not None and (
        is_list_of_examples(batch, count) or any(has_lists(part, count, depth - 1) for part in opened.parts)
    )


def guess_count(batch: Any, *, by_index: bool = True) -> int | None:
    """Guess the number of examples in a batch of which nobody tells it.

    Args:
        batch: any nesting.
        by_index: whether ascending numbers are taken for an index.

    Returns:
        The number of sequences in a packed one, or in a list of tensors of different sizes, or of graphs in
        an index that says of which one each row is; else the first dimension that most tensors have, of the
        first tensor where these are as many. None if it holds no tensors.
    """
    tensors = [tensor for tensor in find_tensors(batch) if tensor.ndim]
    lengths = [len(tensor) for tensor in tensors]
    for count, own in _count_parts(batch, MOST_DEPTH):
        inside, rows = {id(tensor) for tensor in own}, {tensor.shape[:1] for tensor in own}
        beside = Counter(len(tensor) for tensor in tensors if id(tensor) not in inside)
        fits = bool(beside) and beside[count] == max(beside.values())
        # Images of several sizes have the same number of rows, as inputs and targets have, which are no list.
        if (fits and (count,) not in rows) or (len(rows) != 1 and (fits or not beside)):
            return count
    found = _find_index(tensors) if by_index else None
    if found is not None:
        return found[1]
    # Class weights, masks and positions may stand before what holds the examples.
    return Counter(lengths).most_common(1)[0][0] if lengths else None


def find_chance(batch: Any) -> float | None:
    """Return how likely it is that class labels look like the index that tells the number of examples.

    Args:
        batch: any nesting.

    Returns:
        The probability that labels drawn evenly are in order, with each class among them; 0 where pairs of
        rows or offsets go with the index, None where no index tells the number.
    """
    tensors = [tensor for tensor in find_tensors(batch) if tensor.ndim]
    found = None if guess_count(batch) == guess_count(batch, by_index=False) else _find_index(tensors)
    if found is None:
        return None
    index, count = found
    others = [tensor for tensor in tensors if tensor is not index]
    if any(_is_offsets(tensor, index, count) or _are_pairs(tensor, index) for tensor in others):
        return 0.0
    return math.comb(len(index) - 1, count - 1) * float(count) ** -len(index)


def _find_index(tensors: Sequence[Tensor]) -> tuple[Tensor, int] | None:
    """Return an index of rows and the number of examples that it counts."""
    for tensor in tensors:
        # Class labels in order look like an index: something else has to be of as many as it counts.
        count, others = _count_by_index(tensor), [other for other in tensors if len(other) != len(tensor)]
        if count is not None and any(
            len(other) == count or _is_offsets(other, tensor, count) for other in others
        ):
            return tensor, count
    return None


def _is_offsets(tensor: Tensor, index: Tensor, count: int) -> bool:
    """Return whether a vector says where the rows of each example begin, and the last ones end."""
    if tensor.ndim != 1 or len(tensor) != count + 1 or not _is_integer(tensor):
        return False
    return int(tensor[0]) == 0 and int(tensor[-1]) == len(index) and bool((tensor[1:] >= tensor[:-1]).all())


def _are_pairs(tensor: Tensor, index: Tensor) -> bool:
    """Return whether a matrix holds pairs of rows, as edges, each within one example."""
    if tensor.ndim != 2 or 2 not in tensor.shape or not tensor.numel() or not _is_integer(tensor):
        return False
    if int(tensor.min()) < 0 or int(tensor.max()) >= len(index):
        return False
    first, second = index[tensor].unbind(0 if tensor.shape[0] == 2 else 1)
    return bool((first == second).all())


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _count_parts(part: Any, depth: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield numbers of sequences in packed ones, in lists of tensors of several sizes or side by side.

    Yields:
        The number, and the tensors in the list.
    """
    if isinstance(part, PackedSequence):
        yield int(part.batch_sizes[0]), []
        return
    opened = open_part(part) if depth else None
    if opened is None:
        return
    own = [item for item in opened.parts if isinstance(item, Tensor) and item.ndim]
    same_kind = len(own) == len(opened.parts) > 1 and len({(item.ndim, item.dtype) for item in own}) == 1
    if isinstance(part, list | tuple) and same_kind and len({item.shape for item in own}) > 1:
        yield len(own), own
    lists = _find_lists(opened.parts)
    if lists:
        yield len(lists[0]), find_tensors(lists)
    for item in opened.parts:
        yield from _count_parts(item, depth - 1)


def _find_lists(parts: Sequence[Any]) -> list[Sequence[Any]]:
    """Return the parts of a batch if they are lists side by side, with as many entries each.

    Tuples count as lists, as ``zip(*examples)`` makes them, where their tensors differ in the first
    dimension: a tuple of those of a batch has the same in all.
    """
    lists = [part for part in parts if type(part) in (list, tuple) and _has_like_entries(part)]
    if not 1 < len(lists) == len(parts) or len({len(part) for part in lists}) > 1:
        return []
    are_plain = all(isinstance(part, list) for part in lists)
    return lists if are_plain or len({tensor.shape[:1] for tensor in find_tensors(lists)}) > 1 else []


def _has_like_entries(parts: Sequence[Any]) -> bool:
    """Return whether the entries of a list are tensors, or hold some, of the same kinds in each."""
    forms = {tuple((tensor.dtype, tensor.ndim) for tensor in find_tensors(part)) for part in parts}
    return len(forms) == 1 and () not in forms


def _mark(part: Any, path: tuple[int, ...]) -> Any:
    if not path:
        return ExampleList(part) if isinstance(part, list | tuple) else part
    opened = open_part(part)
    if opened is None or len(opened.parts) <= path[0]:
        return part
    changed = _mark(opened.parts[path[0]], path[1:])
    return opened.close([*opened.parts[: path[0]], changed, *opened.parts[path[0] + 1 :]])


def _count_by_index(tensor: Tensor) -> int | None:
    """Return of how many examples an index of rows is: ascending numbers from 0 without a gap."""
    if tensor.ndim != 1 or not _is_integer(tensor):
        return None
    steps = tensor[1:] - tensor[:-1]
    count = int(tensor[-1]) + 1 if len(tensor) else 0
    ascending = int(tensor[0]) == 0 and bool(((steps == 0) | (steps == 1)).all()) if count else False
    return count if ascending and 1 < count < len(tensor) else None


def _walk(part: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
        return
    opened = open_part(part) if depth else None
    for item in opened.parts if opened is not None else ():
        yield from _walk(item, depth - 1)


def _map(part: Any, change: Callable[[Tensor], Tensor], depth: int, *, whole: bool = False) -> Any:
    if isinstance(part, Tensor):
        return change(part)
    opened = open_part(part) if depth else None
    if opened is None:
        return part
    if whole and not isinstance(part, Mapping | list | tuple) and callable(getattr(part, "clone", None)):
        return part.clone()
    parts = [_map(item, change, depth - 1, whole=whole) for item in opened.parts]
    same = all(new is old for new, old in zip(parts, opened.parts, strict=True))
    return part if same else opened.close(parts)


def _find_attributes(part: Any) -> list[str]:
    slots = [getattr(kind, "__slots__", ()) for kind in type(part).__mro__]
    names = [name for some in slots for name in ([some] if isinstance(some, str) else some)]
    return [*getattr(part, "__dict__", ()), *(name for name in names if not name.startswith("__"))]


def _close_mapping(part: Mapping[Any, Any], values: Sequence[Any]) -> Any:
    try:
        result: Any = copy.copy(part)
        for key, value in zip(part, values, strict=True):
            result[key] = value
    except TypeError:  # a mapping that cannot be written to
        return dict(zip(part, values, strict=True))
    return result


def _close_object(part: Any, names: Sequence[str], values: Sequence[Any]) -> Any:
    result = copy.copy(part)
    for name, value in zip(names, values, strict=True):
        if value is not getattr(part, name):
            object.__setattr__(result, name, value)  # frozen ones, too
    return result
