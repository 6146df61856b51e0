"""Threads of one process ask one after the other.

What a question borrows is shared: the modes and gradients of a module, which may hold layers of another one,
its Trainer, the random generators of the process, and whether compiled code runs eagerly. A second thread
waits until the first one has given everything back.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])
# A thread may ask within its own question, as nested runners do.
_turn = threading.RLock()


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Wait for a turn, and have it for the time of the block."""
    with _turn:
        yield


def take_turns(function: _Function) -> _Function:
    """Decorate a function that borrows from its arguments' first look on: one thread at a time runs it."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with turn():
            return function(*args, **kwargs)

    return cast(_Function, alone)
