"""What collecting takes by the clock, in steps of the training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

#: What the time is read from, in seconds. Work that a device still has to do when a hook returns counts as
#: the training's; a collected batch waits for the device once, and counts some of the training's as its own.
read_clock: Callable[[], float] = time.perf_counter


class Stopwatch:
    """Times the training's steps, and within them the work of collecting."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew; what runs now is not counted."""
        self.work = self.training = 0.0
        self.steps = 0
        self._began: float | None = None
        self._own = 0.0  # of the step that runs

    def begin_step(self) -> None:
        """Begin a step, with the work that precedes it."""
        self._began, self._own = read_clock(), 0.0

    def end_step(self) -> None:
        """End the step."""
        if self._began is not None:
            self.training += read_clock() - self._began - self._own
            self.steps += 1
        self._began = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count what runs in here as work, not as the training's."""
        start = read_clock()
        try:
            yield
        finally:
            taken = read_clock() - start
            self.work += taken
            self._own += taken
