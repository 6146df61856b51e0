"""Fingerprints of code and data: what has to change for a stored result to be out of date.

The source of a function is not enough: ``lambda: Net(WIDTH)`` also depends on the class ``Net`` and on the
number ``WIDTH``. :func:`describe` follows the global names that a function uses through the user's own
modules; libraries count by their versions alone.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_LIBRARIES = tuple(
    str(Path(sysconfig.get_paths()[name]).resolve())
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
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
    """Everything of the user's that a function or class is made of, in words.

    Args:
        thing: a function or class.

    Returns:
        Its source, those of the user's functions and classes that it names and so on, values of plain
        globals, defaults and closures; for what belongs to a library, its name.
    """
    words: list[str] = []
    _visit(thing, words, {})
    return words


def digest(words: Iterable[str]) -> str:
    """Return 24 hexadecimal digits of the SHA-256 of some words."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]


def content(value: Any) -> str:
    """Hash of an example or a batch: tensors and arrays by value, containers item by item.

    Args:
        value: tensors, arrays, numbers, strings, bytes, and dictionaries, lists and tuples of them.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: if it holds anything else.

    Example:
        >>> content({"x": torch.ones(2)}) == content({"x": torch.ones(2)})
        True
        >>> content(1) == content(1.0)
        False
    """
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r};".encode()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key, item in value.items():
            yield from _parts(key)
            yield from _parts(item)
    elif isinstance(value, Sequence):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):  # arrays and numbers of NumPy
        yield f"array {value.dtype} {getattr(value, 'shape', ())}".encode()
        yield value.tobytes()
    else:
        raise TypeError(
            f"An example holds a {type(value).__name__}, whose content cannot be hashed; accepted are "
            "tensors, arrays, numbers, strings, bytes and containers of them. Give `data_key=`, a string "
            "that changes whenever the data do."
        )


def _is_library(module: str | None) -> bool:
    if not module or module.split(".")[0] in {"builtins", "lightning_influence"}:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module != "__main__"
    return str(Path(file).resolve()).startswith(_LIBRARIES)


def _visit(thing: Any, words: list[str], seen: dict[int, Any]) -> None:
    if isinstance(thing, Tensor):
        words.append(content(thing))
        return
    if isinstance(thing, _PLAIN):
        words.append(repr(thing))
        return
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # kept alive: the id of a temporary would be given out again
    if isinstance(thing, Mapping | Sequence | set | frozenset):
        items = [*thing.items()] if isinstance(thing, Mapping) else [*thing]
        for item in sorted(items, key=repr) if isinstance(thing, set | frozenset) else items:
            _visit(item, words, seen)
    elif isinstance(thing, functools.partial):
        _visit((thing.func, thing.args, thing.keywords), words, seen)
    elif isinstance(thing, ModuleType):
        words.append(thing.__name__)
        if not _is_library(thing.__name__) and thing.__file__:
            words.append(Path(thing.__file__).read_text(encoding="utf-8"))
    else:
        _visit_code(inspect.unwrap(thing) if callable(thing) else thing, words, seen)


def _visit_code(thing: Any, words: list[str], seen: dict[int, Any]) -> None:
    """Follow a function, a method or a class; anything else counts by its type."""
    function = getattr(thing, "__func__", thing)
    named = isinstance(function, type | FunctionType)
    owner = function if named else type(function)
    words.append(f"{owner.__module__}.{owner.__qualname__}")
    if _is_library(owner.__module__):
        return
    words.append(_source(owner))
    if isinstance(function, FunctionType):
        _visit_function(function, words, seen)
    elif isinstance(owner, type):
        for base in owner.__mro__[1:]:
            _visit(base, words, seen)
        for member in vars(owner).values():
            inner = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(inner, FunctionType):
                _visit_function(inner, words, seen)


def _visit_function(function: FunctionType, words: list[str], seen: dict[int, Any]) -> None:
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            words.append(name)
            _visit(function.__globals__[name], words, seen)
    _visit((function.__defaults__, function.__kwdefaults__), words, seen)
    for cell in function.__closure__ or ():
        _visit(_cell(cell), words, seen)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
