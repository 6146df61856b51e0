"""An item of a dataset as something to look at: a picture, a text, a row of a table or a signal.

What is shown is chosen from the item's type and shape. A *part* is a dictionary with one of the keys
``image`` (the address of a picture, its bytes within), ``text``, ``row`` (pairs of name and value) and
``signal`` (channels of numbers), and with ``name`` where the item gave it one.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.results.images import encode_png, is_array, to_image

# What a glance takes in, chosen by hand; what is longer is cut, and says so.
_LONGEST_TEXT = 2000
_LONGEST_CELL = 40
_MOST_COLUMNS = 32
_MOST_CHANNELS = 6
_MOST_POINTS = 240
_SMALLEST_IMAGE = 4
# A matrix of floats that is so narrow, and so much longer, is a signal of several channels, not a picture.
_WIDEST_SIGNAL, _LONGER = 32, 4
_TARGETS = ("label", "labels", "target", "targets", "y", "class", "class_label")

Part = dict[str, Any]


def split_item(item: Any) -> tuple[Any, Any]:
    """Tell an item's input from its target.

    Args:
        item: what a dataset returned: ``(input, target, ...)``, a mapping with a target under one of the
            usual names, or an input alone.

    Returns:
        The input, and the target as a Python number or text; None if there is no single one.
    """
    if isinstance(item, Mapping):
        for name in _TARGETS:
            target = _to_scalar(item.get(name))
            if target is not None:
                return {key: value for key, value in item.items() if key != name}, target
        return item, None
    if isinstance(item, tuple | list) and len(item) >= 2:
        target = _to_scalar(item[1])
        if target is not None and not isinstance(item[0], int | float):  # numbers alone are a row
            return item[0] if len(item) == 2 else (item[0], *item[2:]), target
    return item, None


def show(value: Any) -> list[Part]:
    """Choose how to show a value.

    Args:
        value: texts, numbers, tensors, arrays, pictures, and mappings and sequences of them.

    Returns:
        The parts; none for None.
    """
    return list(_show(value, depth=3))


def _show(value: Any, depth: int) -> Iterator[Part]:
    scalar = _to_scalar(value)
    if value is None:
        return
    if isinstance(value, str):
        yield {"text": cut(value)}
    elif scalar is not None:
        yield {"row": [["", write_number(scalar)]]}
    elif is_array(value):
        yield from _show_array(_to_array(value))
    elif depth and isinstance(value, Mapping):
        yield from _show_mapping(value, depth)
    elif depth and isinstance(value, tuple | list):
        yield from _show_sequence(value, depth)
    else:
        yield {"text": cut(repr(value))}


def _show_mapping(value: Mapping[Any, Any], depth: int) -> Iterator[Part]:
    row = {str(key): _to_cell(entry) for key, entry in value.items()}
    numbers = [[name, write_number(number)] for name, number in row.items() if number is not None]
    if numbers:
        yield {"row": _cut_row(numbers)}
    for key, entry in value.items():
        if row[str(key)] is None:
            for part in _show(entry, depth - 1):
                yield {"name": str(key), **part}


def _show_sequence(value: tuple[Any, ...] | list[Any], depth: int) -> Iterator[Part]:
    if value and all(isinstance(entry, str) for entry in value):
        yield {"text": cut(" ".join(value))}
    elif value and all(isinstance(_to_scalar(entry), int | float) for entry in value):
        yield from _show_array(np.asarray([_to_scalar(entry) for entry in value]))
    else:
        for entry in value[:_MOST_CHANNELS]:
            yield from _show(entry, depth - 1)
        if len(value) > _MOST_CHANNELS:
            yield {"text": f"and {len(value) - _MOST_CHANNELS} more entries"}


def _show_array(array: NDArray[Any]) -> Iterator[Part]:
    if array.size == 0 or array.dtype.kind not in "biuf":
        yield {"text": cut(f"array of shape {tuple(array.shape)}, {array.dtype}")}
    elif array.ndim == 1:
        yield _show_vector(array)
    elif array.ndim == 2 and _is_signal(array):
        yield _show_signal(array if len(array) < array.shape[1] else array.T)
    elif _is_image(array):
        content = base64.b64encode(encode_png(to_image(array))).decode()
        yield {"image": f"data:image/png;base64,{content}"}
    else:
        mean = f"{array.astype(np.float64).mean():.4g}"
        yield {"text": f"array of shape {tuple(array.shape)}, mean {mean}"}


def _show_vector(array: NDArray[Any]) -> Part:
    if array.dtype.kind in "biu":  # indices of words, most often
        return {"text": cut(" ".join(map(str, array.tolist())))}
    if len(array) > _MOST_COLUMNS:
        return _show_signal(array[None])
    return {"row": [[str(place), write_number(value)] for place, value in enumerate(array.tolist())]}


def _is_signal(array: NDArray[Any]) -> bool:
    """Tell a signal, channels by time or time by channels, from a picture."""
    short, long = sorted(array.shape)
    is_long = short <= _WIDEST_SIGNAL and long >= _LONGER * short and array.dtype.kind == "f"
    return short < _SMALLEST_IMAGE < long or (is_long and long > _SMALLEST_IMAGE)


def _is_image(array: NDArray[Any]) -> bool:
    try:
        sides = to_image(array).shape[:2]
    except ValueError:
        return False
    return min(sides) >= _SMALLEST_IMAGE or array.ndim == 3


def _show_signal(array: NDArray[Any]) -> Part:
    channels = []
    for channel in array[:_MOST_CHANNELS].astype(np.float64):
        values = _thin_out(channel) if len(channel) > _MOST_POINTS else channel
        channels.append([float(f"{v:.5g}") if math.isfinite(v) else None for v in values.tolist()])
    part: Part = {"signal": channels, "length": array.shape[1]}
    if len(array) > _MOST_CHANNELS:
        part["more"] = len(array) - _MOST_CHANNELS
    return part


def _thin_out(channel: NDArray[Any]) -> NDArray[Any]:
    """Keep the lowest and the highest value of each stretch, so that no spike is lost."""
    stretches = np.array_split(np.nan_to_num(channel), _MOST_POINTS // 2)
    return np.array([bound for part in stretches for bound in (part.min(), part.max())])


def _to_scalar(value: Any) -> int | float | str | None:
    """Return a number or a text of one element as Python's own, None for anything else."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        number = value.item()
        return number if isinstance(number, bool | int | float | str) else None
    return None


def _to_cell(value: Any) -> int | float | str | None:
    """Return what stands in one cell of a table; None for anything else, long texts among it."""
    scalar = _to_scalar(value)
    return None if isinstance(scalar, str) and len(scalar) > _LONGEST_CELL else scalar


def _to_array(value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        numbers: NDArray[Any] = (value.float() if value.is_floating_point() else value).numpy()
        return numbers
    if getattr(value, "mode", None) == "P" and hasattr(value, "convert"):  # indices into a palette
        value = value.convert("RGB")
    return np.asarray(value)


def write_number(value: int | float | str) -> str:
    """A number as a short text; texts stay what they are.

    Args:
        value: the number.

    Returns:
        Four significant digits of a float.
    """
    return f"{value:.4g}" if isinstance(value, float) else cut(str(value))


def cut(text: str) -> str:
    """A text that is not too long to be looked at; what is cut off is counted.

    Args:
        text: any text.

    Returns:
        The text, or its beginning.
    """
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]} … and {len(text) - _LONGEST_TEXT:,} more characters"


def _cut_row(row: list[list[str]]) -> list[list[str]]:
    hidden = len(row) - _MOST_COLUMNS
    return row if hidden <= 0 else [*row[:_MOST_COLUMNS], ["…", f"and {hidden} more"]]
