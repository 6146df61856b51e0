"""CPU seconds within the hooks of a callback: what of its cost is resolved where fits differ by more."""

from __future__ import annotations

import functools
import time
from typing import Any

import lightning


class HookClock:
    """Times the hooks of one callback. What they slow down between them, as watched functions, is not in it.

    Args:
        callback: before its fit.

    Attributes:
        seconds: of the CPU, so far.
    """

    def __init__(self, callback: lightning.Callback) -> None:
        self.seconds = 0.0
        for name in dir(lightning.Callback):
            if name.startswith("on_") or name == "setup":
                setattr(callback, name, functools.partial(self._run, getattr(callback, name)))

    def _run(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return hook(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - start

    def share(self, total: float) -> float:
        """Return what of a fit that took so many seconds the hooks took, of the rest."""
        return self.seconds / (total - self.seconds)
