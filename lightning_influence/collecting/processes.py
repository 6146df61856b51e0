"""The processes of a fit, and how failures are told of."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_influence.support.errors import InfluenceError, LossCaptureError

# Errors of torch may run to pages. Chosen by hand: what a terminal shows in four lines.
_LONGEST_REASON = 400


class CollectingError(InfluenceError):
    """Collecting ends on every process at the same step; the message says why."""


def describe_error(error: Exception) -> str:
    """Return an error's message as a sentence: of another library's, its kind and how it begins."""
    if isinstance(error, LossCaptureError):
        return error.reason  # a pass will find the loss in other ways than by its functions
    if isinstance(error, InfluenceError):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    text = f"{type(error).__name__}: {first}"
    text = textwrap.shorten(text, _LONGEST_REASON, placeholder=" ...").rstrip(":")
    return text if text.endswith(".") else f"{text}."


@dataclass(frozen=True)
class Processes:
    """The processes of a fit.

    Attributes:
        rank: number of this process.
        world_size: how many there are.
        share: sums a tensor over them in place; None for one process.
    """

    rank: int = 0
    world_size: int = 1
    share: Callable[[Tensor], Tensor] | None = None
