"""Errors of collecting, kept from the training that is collected from."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator

from lightning_influence.support.errors import InfluenceError

# Those of torch may run to pages.
_LONGEST = 400
_TRAINS_ON = (
    "Training goes on as without the callback, and factors will be fitted in a pass of their own when "
    "influence is asked for."
)
ON_ANOTHER_PROCESS = f"Collecting failed on another process, whose warning gives the reason. {_TRAINS_ON}"


class CollectingError(InfluenceError):
    """Nothing more can be collected from this fit; the message says why and what happens instead."""


@contextlib.contextmanager
def contained(*passed: type[Exception]) -> Iterator[None]:
    """Turn whatever goes wrong into the one error that a callback stops collecting at.

    Args:
        passed: errors that are left as they are.

    Raises:
        CollectingError: naming what went wrong.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (CollectingError, *passed)):
            raise
        raise CollectingError(f"{_reason(error)} {_TRAINS_ON}") from error


def _reason(error: Exception) -> str:
    """Return the message of an error as a sentence: of another library's, its kind and how it begins."""
    if isinstance(error, InfluenceError):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    text = textwrap.shorten(f"{type(error).__name__}: {first}", _LONGEST, placeholder=" ...").rstrip(":")
    return text if text.endswith(".") else f"{text}."
