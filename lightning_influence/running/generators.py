"""Random generators that a user's loaders hold: found in datasets, samplers and collate functions.

An augmentation may draw from a generator of its own. Every pass is to see the same draws, and the user's
generators are to be as they were.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lightning_influence.running.host.packages import find_package
from lightning_influence.support.random_states import hold_generator, is_generator

# A transform in a list in a dataset in a list of a joined dataset in a subset of a loader is this deep.
_DEPTH = 8
# Chosen by hand: longer containers hold data, and no search of a dataset takes longer than a batch does.
_LONGEST, _MOST = 256, 10_000
_PLAIN = (int, float, complex, str, bytes, type(None), type, torch.Tensor, np.ndarray, types.ModuleType)


def find_generators(*owners: object) -> list[object]:
    """Return the generators that objects hold, each once: in their attributes, and in what these hold.

    Functions are looked into as well: what they close over, what they are bound to. Long containers, which
    hold data, and modules and Trainers of Lightning are not.
    """
    found: list[object] = []
    seen: set[int] = set()
    # What is near comes first, so that a large graph of objects hides nothing but what is far.
    waiting = deque((owner, _DEPTH) for owner in owners)
    while waiting and len(seen) < _MOST:
        value, depth = waiting.popleft()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if is_generator(value):
            found.append(value)
        elif depth and find_package(value) is None:
            waiting.extend((part, depth - 1) for part in _open(value))
    return found


def _open(value: Any) -> Iterable[object]:
    """Return what a value holds."""
    if isinstance(value, Mapping | list | tuple | set | frozenset | deque):
        short = len(value) <= _LONGEST
        return (value.values() if isinstance(value, Mapping) else list(value)) if short else ()
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        with contextlib.suppress(ValueError):  # a cell may be empty still
            return [*(cell.cell_contents for cell in value.__closure__ or ()), value.__defaults__]
        return []
    held = getattr(value, "__dict__", None)
    return list(held.values()) if isinstance(held, dict) else ()


@contextlib.contextmanager
def preserve_generators(*owners: object) -> Iterator[None]:
    """Put the states of the generators that objects hold back on exit."""
    held = [hold_generator(generator) for generator in find_generators(*owners)]
    try:
        yield
    finally:
        for put_back in held:
            put_back()
