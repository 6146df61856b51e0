"""Notes and warnings that are given once, and heard by the question that they are given in."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_influence.support.errors import InfluenceWarning

# A child of Lightning's own logger, whose level and handlers it shares.
_LOG = logging.getLogger("lightning.pytorch.influence")

#: Takes a message and its kind, and returns whether nothing of the kind was said before.
Listener = Callable[[str, str], bool]
# Innermost last. Backward passes run in threads of their own, so that all threads share them.
_LISTENERS: list[Listener] = []


@contextlib.contextmanager
def listening(hear: Listener) -> Iterator[None]:
    """Let somebody hear every warning of this library that is given in a ``with`` block."""
    _LISTENERS.append(hear)
    try:
        yield
    finally:
        _LISTENERS.remove(hear)


def warn(message: str, kind: str | None = None, *, stacklevel: int = 2) -> None:
    """Warn, unless the question that runs has said so.

    Its certificate says the same, which is why no other module calls ``warnings.warn`` with an
    :class:`InfluenceWarning` while a question runs.

    Args:
        message: what was left out or assumed, and what to do.
        kind: what messages of other figures have in common, of which the first is enough; None: the message.
        stacklevel: as of ``warnings.warn`` called in this place.
    """
    # All of them hear it, whatever the first says.
    is_new = [hear(message, kind or message) for hear in _LISTENERS]
    if all(is_new):
        warnings.warn(message, InfluenceWarning, stacklevel=stacklevel + 1)


class Notices:
    """Warns once for each kind of message, however often it is said."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: str | None, kind: str | None = None) -> None:
        """Warn, unless there is no message, or one of its kind (by default: the same) was given before."""
        if message is not None and (kind or message) not in self._said:
            self._said.add(kind or message)
            warn(message, kind, stacklevel=3)


class Notes:
    """What an answer was made of, left out or assumed: kept for its certificate, and said once.

    What may change an answer, or what somebody makes of it, is a warning; what was done to get it right is
    information, which Lightning's logger shows as it does its own.

    Attributes:
        messages: all notes, in order.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._said: set[str] = set()

    def hear(self, message: str, kind: str) -> bool:
        """Keep a message.

        Returns:
            Whether nothing of its kind was said before.
        """
        if kind in self._said:
            return False
        self._said.add(kind)
        self.recall([message])
        return True

    def recall(self, messages: Iterable[str]) -> None:
        """Keep what earlier questions were told, and is true of this one, without saying it."""
        self.messages += [message for message in dict.fromkeys(messages) if message not in self.messages]

    def add(self, message: str) -> None:
        """Say something, unless it was said before."""
        if self.hear(message, message):
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
