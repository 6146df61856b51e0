"""Batches of any form: containers and objects in any nesting, taken apart and put together again."""

from __future__ import annotations

import copy
import functools
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


def has_lists(batch: Any, count: int, depth: int = MOST_DEPTH) -> bool:
    """Return whether a batch holds a list with a tensor for each of ``count`` examples."""
    opened = open_part(batch) if depth else None
    return opened is not None and (
        is_list_of_examples(batch, count) or any(has_lists(part, count, depth - 1) for part in opened.parts)
    )


def guess_count(batch: Any) -> int | None:
    """Guess the number of examples in a batch of which nobody tells it.

    Args:
        batch: any nesting.

    Returns:
        The number of sequences in a packed one, or in a list of tensors of different sizes, or of graphs in
        an index that says of which one each row is; else the first dimension that most tensors have, of the
        first tensor where these are as many. None if it holds no tensors.
    """
    tensors = [tensor for tensor in find_tensors(batch) if tensor.ndim]
    lengths = [len(tensor) for tensor in tensors]
    for count in _count_parts(batch, MOST_DEPTH):
        if count in lengths or count + 1 in lengths or len(lengths) == count:
            return count
    for tensor in tensors:
        # Class labels in order look like an index: something else has to be of as many as it counts.
        indexed, others = _count_by_index(tensor), {*lengths} - {len(tensor)}
        if indexed is not None and others & {indexed, indexed + 1}:
            return indexed
    # Class weights, masks and positions may stand before what holds the examples.
    return Counter(lengths).most_common(1)[0][0] if lengths else None


def _count_parts(part: Any, depth: int) -> Iterator[int]:
    """Yield numbers of sequences in packed ones, in lists of tensors of several sizes or side by side."""
    if isinstance(part, PackedSequence):
        yield int(part.batch_sizes[0])
        return
    opened = open_part(part) if depth else None
    if opened is None:
        return
    shapes = [item.shape for item in opened.parts if isinstance(item, Tensor)]
    same_kind = len(shapes) == len(opened.parts) > 1 and len({shape[1:] for shape in shapes}) == 1
    if isinstance(part, list | tuple) and same_kind and len({shape[:1] for shape in shapes}) > 1:
        yield len(shapes)
    lists = [item for item in opened.parts if isinstance(item, list) and _is_of_one_kind(item)]
    if 1 < len(lists) == len(opened.parts) and len({len(item) for item in lists}) == 1:
        yield len(lists[0])
    for item in opened.parts:
        yield from _count_parts(item, depth - 1)


def _is_of_one_kind(parts: list[Any]) -> bool:
    """Return whether a list holds tensors of one form."""
    forms = {(part.dtype, part.shape) if isinstance(part, Tensor) else None for part in parts}
    return len(forms) == 1 and None not in forms


def _count_by_index(tensor: Tensor) -> int | None:
    """Return of how many examples an index of rows is: ascending numbers from 0 without a gap."""
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
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
