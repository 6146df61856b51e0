"""Versions of stored states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_influence.errors import FactorMismatchError


def check_version(state: Mapping[str, Any], expected: int, *, subject: str, remedy: str) -> None:
    """Refuse a state that another version of the library wrote.

    Args:
        state: with an entry ``version``.
        expected: the version that is read.
        subject: what the state is, with its verb.
        remedy: what to do.

    Raises:
        FactorMismatchError: if the versions differ.
    """
    if state.get("version") != expected:
        raise FactorMismatchError(
            f"{subject} version {state.get('version')!r}, this library reads version {expected}. {remedy}"
        )
