"""What settings of all kinds share: reading them from keyword arguments, and checks of their values."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


Kind = TypeVar("Kind", bound=_Dataclass)


def settings_of(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """Make settings of keyword arguments that a user gave.

    Args:
        kind: a dataclass whose fields are the settings.
        given: values by name.

    Returns:
        The settings.

    Raises:
        TypeError: if there is no such setting; names the nearest, and all that there are.
    """
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"Got an unknown option {name!r}.{hint} Accepted are {', '.join(known)}.")
    return kind(**{name: plain_number(value) for name, value in given.items()})


def is_count(value: object, least: int) -> bool:
    """Return whether a value is an integer of at least so much that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**62


def check_layers(layers: Any) -> None:
    """Refuse what is no list of layers' names.

    Args:
        layers: names or patterns; None for all layers.

    Raises:
        TypeError: saying what was got; of a text, how it is meant to be passed.
    """
    if layers is None:
        return
    accepted = f"Got layers={layers!r}; accepted is a list of names or patterns"
    if isinstance(layers, str):
        raise TypeError(f"{accepted}: layers=[{layers!r}].")
    if not isinstance(layers, Iterable) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"{accepted}.")


def plain_number(value: Any) -> Any:
    """Return a number of another library, such as a NumPy scalar, as Python's own; all else as it is.

    Example:
        >>> from fractions import Fraction
        >>> plain_number(Fraction(1, 2)), plain_number(True), plain_number("auto")
        (0.5, True, 'auto')
    """
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value
