"""Fingerprints of code: what has to change for a stored result to be out of date.

The source of a function is not enough: ``lambda: Net(WIDTH)`` also depends on the class ``Net`` and on the
number ``WIDTH``, a factory object on its attributes. :func:`describe` follows all of them, see :mod:`.walk`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import metadata
from types import FunctionType
from typing import Any

from lightning_influence.evaluation.walk import Walk, source_of

_VERSIONS = ("torch", "lightning", "numpy", "lightning-influence")


def versions(names: Iterable[str] = _VERSIONS) -> list[str]:
    """Return ``name version`` of each package, ``unknown`` for one that is not installed."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} unknown")
    return found


def describe(thing: Any) -> list[str]:
    """Everything of the user's that a function, a class or an object is made of, in words.

    Args:
        thing: a function, a class, or an object that is called or names a method that is.

    Returns:
        Its source, those of the user's functions and classes that it names and so on, the values of globals,
        defaults and closures, the state of objects; for what belongs to a library, its name.

    Raises:
        TypeError: if a value cannot be described.
    """
    walk = Walk()
    walk.visit(thing)
    return walk.words


def beyond_source(thing: Any) -> list[str]:
    """What decides a call besides the source text: nothing for a plain function that names libraries alone.

    Args:
        thing: a function, or what is called in its place. A class counts by its source, and adds nothing.

    Returns:
        Words as of :func:`describe`, without the function's own source and libraries' things that go by their
        own names.

    Raises:
        TypeError: if a value cannot be described.
    """
    if isinstance(thing, type):
        return []
    if not isinstance(thing, FunctionType) or hasattr(thing, "__wrapped__") or not source_of(thing):
        return describe(thing)
    walk = Walk()
    walk.function_values(thing, own_names=False)
    return walk.words


def digest(words: Iterable[str]) -> str:
    """Return 24 hexadecimal digits of the SHA-256 of some words."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]
