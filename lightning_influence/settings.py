"""Settings from keyword arguments: what is misspelt is refused by name, NumPy's numbers become Python's."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Mapping
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
