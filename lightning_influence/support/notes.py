"""Notes and warnings that are given once."""

from __future__ import annotations

import logging
import warnings

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_influence.support.errors import InfluenceWarning

# A child of Lightning's own logger, whose level and handlers it shares.
_LOG = logging.getLogger("lightning.pytorch.influence")


class Notices:
    """Warns once for each kind of message, however often it is said."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: str | None, kind: str | None = None) -> None:
        """Warn, unless there is no message, or one of its kind (by default: the same) was given before."""
        if message is not None and (kind or message) not in self._said:
            self._said.add(kind or message)
            warnings.warn(message, InfluenceWarning, stacklevel=3)


class Notes:
    """What an answer was made of, left out or assumed: kept for its certificate, and said once.

    What may change an answer, or what somebody makes of it, is a warning; what was done to get it right is
    information, which Lightning's logger shows as it does its own.

    Attributes:
        messages: all notes, in order.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Say something, unless it was said before."""
        if message not in self.messages:
            self.messages.append(message)
            warnings.warn(message, InfluenceWarning, stacklevel=2)

    def inform(self, message: str) -> None:
        """Say what is no reason to worry, unless it was said before."""
        if message not in self.messages:
            self.messages.append(message)
            say(message)


def say(message: str) -> None:
    """Let Lightning's logger show a message, on the first process."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        _LOG.info(message)
