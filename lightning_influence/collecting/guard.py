"""What keeps errors of a callback from the training that it watches."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Guard:
    """A context that hands errors to a function in place of raising them; it can be entered again and again.

    It runs several times in every step of a fit, where a generator's would take longer than what it guards.

    Args:
        handle: is given the error, and may raise it or another; interrupts are none.
    """

    __slots__ = ("_handle",)

    def __init__(self, handle: Callable[[Exception], None]) -> None:
        self._handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self._handle(error)
        return True
