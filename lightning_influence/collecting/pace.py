"""Which epochs training dynamics are kept of, so that they cost a fit a share of its time at most.

An epoch is watched from its first step to its last or not at all, so that what is kept of it is exact. The
first begins; one that turns out to be too expensive is given up and left out, and the next waits until there
is time for it. So the watched epochs lie evenly, and nothing has to be known of the run beforehand.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_influence.collecting import stopwatch
from lightning_influence.model.live.live_capture import time_call

# Chosen by hand: seconds that no fit minds. Short ones are seen whole with them.
_GRACE = 0.1


class Pace:
    """Times what watching takes, within ``with pace:``, and says when to leave it.

    Args:
        share: of the fit's time, from now on; None to watch every epoch, whatever it takes.

    Attributes:
        spent: seconds so far.
        rests: whether the epoch that runs is not watched, or no longer.
    """

    def __init__(self, share: float | None = None) -> None:
        self.spent, self.rests = 0.0, False
        self._share = share
        self._began = self._epoch_began = stopwatch.read_clock()
        self._epoch_spent = self._ahead = 0.0  # before this epoch; what another is expected to take
        self._tried = True  # whether this epoch was begun
        self._entered = 0.0
        self._call: float | None = None

    def __enter__(self) -> None:
        self._entered = stopwatch.read_clock()

    def __exit__(self, *error: object) -> None:
        self.spent += stopwatch.read_clock() - self._entered

    def count_met(self, met: int) -> None:
        """Add what a step took outside of ``with pace:``.

        Args:
            met: how many functions of torch it called while they were watched.
        """
        if met and self._share is not None:
            if self._call is None:
                self._call = time_call()
            self.spent += met * self._call

    def gives_up(self) -> bool:
        """Return whether the epoch has just become too expensive; from there on it is not watched."""
        if self._share is None or self.rests or self.spent <= self._allowed(0.0):
            return False
        self.rests = True
        return True

    def end_epoch(self, agree: Callable[[list[bool]], list[bool]]) -> bool:
        """Decide about the next epoch.

        Args:
            agree: returns what holds on any of the processes, if it does on this one.

        Returns:
            Whether the epoch that ends was watched whole, by all processes.
        """
        if self._share is None:
            return True
        now = stopwatch.read_clock()
        if self._tried:  # how much of an epoch was seen of one that was given up is not known
            self._ahead = (self.spent - self._epoch_spent) * (2 if self.rests else 1)
        scarce = self.spent + self._ahead > self._allowed(now - self._epoch_began)
        rested, self.rests = agree([self.rests, scarce])
        self._tried = not self.rests
        self._epoch_began, self._epoch_spent = now, self.spent
        return not rested

    def _allowed(self, later: float) -> float:
        """Return the seconds that may be spent until some seconds from now."""
        assert self._share is not None
        return max(_GRACE, self._share * (stopwatch.read_clock() - self._began + later))
