"""CPU seconds within the hooks of a callback: what of its cost is resolved where fits differ by more."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning

from lightning_influence import InfluenceCallback

HOOKS = [name for name in dir(lightning.Callback) if name.startswith("on_") or name == "setup"]
# What these call of training dynamics, at the callback's ``_dynamics``.
DYNAMICS = ["open", "start", "begin_epoch", "begin_batch", "take", "end_batch", "leave_batch", "end_fit"]


class HookClock:
    """Times methods of one object: by default the hooks of a callback.

    What they slow down between them, as watched functions, is not in it.

    Args:
        watched: before its fit.
        names: of the methods; they do not call each other.

    Attributes:
        seconds: of the CPU, so far.
    """

    def __init__(self, watched: Any, names: Sequence[str] = HOOKS) -> None:
        self.seconds = 0.0
        for name in names:
            setattr(watched, name, functools.partial(self._run, getattr(watched, name)))

    def _run(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return hook(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - start

    def share(self, total: float) -> float:
        """Return what of a fit that took so many seconds the hooks took, of the rest."""
        return self.seconds / (total - self.seconds)


def measure_shares(fit: Callable[[InfluenceCallback], float]) -> tuple[float, float]:
    """Time hooks and training dynamics, each in a fit of its own: a clock costs a short step 1% itself.

    Args:
        fit: fits with a callback, and returns the CPU seconds of that.

    Returns:
        What all hooks took, and what dynamics took of that, as shares of the rest of a fit.
    """
    callback = InfluenceCallback()
    hooks = HookClock(callback)
    share = hooks.share(fit(callback))
    callback = InfluenceCallback()
    dynamics = HookClock(callback._dynamics, DYNAMICS)
    total = fit(callback)
    return share, dynamics.seconds / total * (1 + share)
