"""Hashes of data: tensors and arrays by value, containers item by item."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, complex, str, bytes)


def is_array(value: Any) -> bool:
    """Return whether a value is a tensor, or an array or a number of NumPy."""
    return isinstance(value, Tensor) or (hasattr(value, "tobytes") and hasattr(value, "dtype"))


def content(value: Any) -> str:
    """Hash of an example or a batch: tensors and arrays by value, containers item by item.

    Args:
        value: tensors, arrays, numbers, strings, bytes, and dictionaries, lists and tuples of them.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: if it holds anything else.

    Example:
        >>> content({"x": torch.ones(2)}) == content({"x": torch.ones(2)})
        True
        >>> content(1) == content(1.0)
        False
    """
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, PLAIN):
        yield f"{type(value).__name__} {value!r};".encode()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key, item in value.items():
            yield from _parts(key)
            yield from _parts(item)
    elif isinstance(value, Sequence):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif is_array(value):
        yield f"array {value.dtype} {getattr(value, 'shape', ())}".encode()
        yield value.tobytes()
    else:
        raise TypeError(
            f"An example holds a {type(value).__name__}, whose content cannot be hashed; accepted are "
            "tensors, arrays, numbers, strings, bytes and containers of them. Give `data_key=`, a string "
            "that changes whenever the data do."
        )
