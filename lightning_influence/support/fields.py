"""Checks of stored values against the dataclass that they are to be fields of."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from torch import Tensor
from typing_extensions import NotRequired, get_type_hints, is_typeddict

from lightning_influence.support.arguments import is_number

_PLAIN: dict[Any, tuple[str, Any]] = {
    float: ("a number", is_number),
    int: ("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    str: ("a text", lambda value: isinstance(value, str)),
    type(None): ("nothing", lambda value: value is None),
    Tensor: ("a tensor", lambda value: isinstance(value, Tensor)),
}


def check_fields(kind: type, values: object, where: str) -> dict[str, Any]:
    """Refuse values that a dataclass of annotated fields cannot hold.

    Args:
        kind: a dataclass whose fields are plain values, tensors, mappings and sequences of them, or such
            dataclasses.
        values: by name; as JSON gives them, with lists for tuples.
        where: what they are called in the message.

    Returns:
        The values.

    Raises:
        ValueError: naming the first field that is missing, unknown or of another type, and what was got.

    Example:
        >>> @dataclasses.dataclass
        ... class Person:
        ...     age: int
        >>> check_fields(Person, {"age": "three"}, "person")
        Traceback (most recent call last):
        ValueError: person.age is 'three'; accepted is an integer.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {_show(values)}; accepted is a table of names and values.")
    hints, known = get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(map(str, values.keys() - known.keys()))
    if unknown:
        raise ValueError(f"{where}.{unknown[0]} is unknown; accepted are {', '.join(known)}.")
    for name, field in known.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if name in values:
            _check(values[name], hints[name], f"{where}.{name}")
        elif required:
            raise ValueError(f"{where}.{name} is missing.")
    return values


def _check(value: Any, hint: Any, where: str) -> None:
    """Refuse a value of another type than annotated.

    Raises:
        ValueError: saying what was got.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _PLAIN or origin in (Union, types.UnionType):
        options = [_PLAIN[option] for option in inner or (hint,)]
        accepted = " or ".join(name for name, _ in options)
        _require(any(holds(value) for _, holds in options), value, where, accepted)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, hint):
            check_fields(hint, value, where)
    elif hint is not Any:
        for part, part_hint, name in _take_apart(value, hint, where):
            _check(part, part_hint, name)


def _take_apart(value: Any, hint: Any, where: str) -> list[tuple[Any, Any, str]]:
    """Return the members of a mapping, sequence or pair, each with its annotation and its name.

    Raises:
        ValueError: if the value is no such container.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if is_typeddict(hint) or issubclass(origin, Mapping):
        _require(isinstance(value, dict), value, where, "a table of names and values")
        if origin is not None:
            return [(item, inner[1], f"{where}[{name!r}]") for name, item in value.items()]
        # Not `__required_keys__`, which does not see through annotations that are strings.
        marked, hints = get_type_hints(hint, include_extras=True), get_type_hints(hint)
        optional: Any = NotRequired
        wanted = [name for name, part in marked.items() if get_origin(part) is not optional]
        _require(value.keys() >= {*wanted}, value, where, f"a table with {', '.join(wanted)}")
        return [(item, hints.get(name, Any), f"{where}.{name}") for name, item in value.items()]
    _require(isinstance(value, list | tuple), value, where, "a list")
    if origin is tuple and Ellipsis not in inner:
        _require(len(value) == len(inner), value, where, f"a list of {len(inner)}")
        return [
            (item, part, f"{where}[{place}]")
            for place, (item, part) in enumerate(zip(value, inner, strict=True))
        ]
    return [(item, inner[0], f"{where}[{place}]") for place, item in enumerate(value)]


def _require(holds: bool, value: Any, where: str, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{where} is {_show(value)}; accepted is {accepted}.")


def _show(value: Any) -> str:
    """Return what was got, cut short."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def read_tensor(
    tensors: Mapping[str, Tensor], name: str, shape: Sequence[int] | None = None, ndim: int | None = None
) -> Tensor:
    """Read one tensor of a file.

    Args:
        tensors: by name.
        name: which.
        shape: what it has to have, if given.
        ndim: how many dimensions it has to have, if given.

    Returns:
        The tensor.

    Raises:
        ValueError: if it is not there or of another shape.
    """
    if name not in tensors:
        raise ValueError(f"there is no tensor {name!r}, only {sorted(tensors)}.")
    tensor = tensors[name]
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted are {ndim} dimensions.")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted is {tuple(shape)}.")
    return tensor
