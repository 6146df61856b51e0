"""Hashes of data: tensors and arrays by value, containers item by item.

A walk through what code is made of: the functions, classes, values and objects that it names.

Functions and classes of the user's count by source, and by the globals, defaults and closures they use.
Objects count by class and state, as pickling sees it. Libraries count by their versions alone: their
functions by name and by what they close over, their classes by name.

Fingerprints of code: what has to change for a stored result to be out of date.

The source of a function is not enough: ``lambda: Net(WIDTH)`` also depends on the class ``Net`` and on the
number ``WIDTH``, a factory object on its attributes. :func:`describe` follows all of them, see :mod:`.walk`.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import os
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, complex, str, bytes)


def is_array(value: Any) -> bool:
    """Return whether a value is a tensor, or an array or a number of NumPy."""
    return isinstance(value, Tensor) or (hasattr(value, "tobytes") and hasattr(value, "dtype"))


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
    elif isinstance(value, PLAIN):
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
    elif is_array(value):
        yield f"array {value.dtype} {getattr(value, 'shape', ())}".encode()
        yield value.tobytes()
    else:
        raise TypeError(
            f"An example holds a {type(value).__name__}, whose content cannot be hashed; accepted are "
            "tensors, arrays, numbers, strings, bytes and containers of them. Give `data_key=`, a string "
            "that changes whenever the data do."
        )


_CONTAINERS = (list, tuple, dict, set, frozenset)
# What decides no result, and has a state of its own in every process.
_SILENT = (type(threading.Lock()), type(threading.RLock()), threading.local, type(os.environ))
_DESCRIPTORS = (classmethod, staticmethod, property, functools.cached_property)
_MEMBERS = (FunctionType, *_DESCRIPTORS)
_LIBRARIES = tuple(
    str(Path(sysconfig.get_paths()[name]).resolve())
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


class Walk:
    """Collects words that change with whatever a thing is made of.

    Attributes:
        words: found so far.
    """

    def __init__(self) -> None:
        self.words: list[str] = []
        # The things are kept alive: the id of a temporary would be given out again.
        self._seen: dict[int, tuple[int, Any]] = {}
        self._path: list[str] = []

    def visit(self, thing: Any) -> None:
        """Add the words of anything.

        Args:
            thing: what is described.

        Raises:
            TypeError: if a value cannot be described, with the names that lead to it.
        """
        if isinstance(thing, PLAIN):
            self.words.append(repr(thing))
        elif is_array(thing):
            self.words.append(_array(thing))
        elif id(thing) in self._seen:
            self.words.append(f"again {self._seen[id(thing)][0]}")
        else:
            self._seen[id(thing)] = len(self._seen), thing
            self._compound(thing)

    def _compound(self, thing: Any) -> None:
        if type(thing) in _CONTAINERS:
            self._items(thing)
        elif isinstance(thing, ModuleType):
            self._module(thing)
        elif isinstance(thing, type):
            self._class(thing)
        elif isinstance(thing, FunctionType):
            self._function(thing)
        elif isinstance(thing, MethodType):
            self.visit(thing.__func__)
            self.visit(thing.__self__)
        elif isinstance(thing, _DESCRIPTORS):
            for part in ("__func__", "fget", "fset", "fdel", "func"):
                self.visit(getattr(thing, part, None))
        else:
            self._object(thing)

    def _named(self, name: str, value: Any) -> None:
        self.words.append(name)
        self._path.append(name)
        self.visit(value)
        self._path.pop()

    def _items(self, items: Any) -> None:
        self.words.append(f"{type(items).__name__} {len(items)}")
        if isinstance(items, dict):
            for key, value in items.items():
                self.visit(key)
                self._named(str(key) if isinstance(key, PLAIN) else "", value)
        else:
            for item in sorted(items, key=repr) if isinstance(items, set | frozenset) else items:
                self.visit(item)

    def _module(self, module: ModuleType) -> None:
        self.words.append(module.__name__)
        if not is_library(module.__name__) and module.__file__:
            self.words.append(Path(module.__file__).read_text(encoding="utf-8"))

    def _class(self, owner: type) -> None:
        self.words.append(f"{owner.__module__}.{owner.__qualname__}")
        if is_library(owner.__module__):
            return
        self.words.append(source_of(owner))
        for base in owner.__mro__[1:]:
            self.visit(base)
        for name, member in vars(owner).items():
            special = name.startswith("__") or name == "_abc_impl"  # Python's own records of the class
            if isinstance(member, _MEMBERS) or not (special or inspect.isdatadescriptor(member)):
                self._named(name, member)

    def _function(self, function: FunctionType) -> None:
        # Not __module__: a decorator with functools.wraps has that of what it wraps.
        module = function.__globals__.get("__name__")
        self.words.append(f"{module}.{function.__qualname__}")
        if not is_library(module):
            self.words.append(source_of(function))
        self.function_values(function, own_names=True)

    def function_values(self, function: FunctionType, *, own_names: bool) -> None:
        """Add what a function uses besides its source: a library's uses what it closes over.

        Args:
            function: the function.
            own_names: whether globals that are libraries' things under their own names count.
        """
        if not is_library(function.__globals__.get("__name__")):
            self._globals(function, own_names)
            for values in (function.__defaults__, function.__kwdefaults__, vars(function)):
                if values:
                    self.visit(values)
        self._closure(function)

    def _globals(self, function: FunctionType, own_names: bool) -> None:
        names = _names(function.__code__)
        if function.__name__ == "<lambda>" or not source_of(function):
            # The source of a lambda is its line, on which others may stand.
            self.words.append(_bytecode(function.__code__))
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            if own_names or not _under_own_name(name, value):
                self._named(name, value)
                self._attributes(value, names - {name})

    def _attributes(self, module: Any, names: set[str]) -> None:
        """Follow what a function uses of the user's module, whose text does not tell its present values."""
        if not isinstance(module, ModuleType) or is_library(module.__name__):
            return
        for name in sorted(names & vars(module).keys()):
            self._named(name, vars(module)[name])
            self._attributes(vars(module)[name], names - {name})

    def _closure(self, function: FunctionType) -> None:
        # torch.compile closes over its machinery.
        inner = getattr(function, "_torchdynamo_orig_callable", None)
        if inner is not None:
            self.visit(inner)
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._named(name, _cell(cell))

    def _object(self, thing: Any) -> None:
        self.visit(type(thing))
        if isinstance(thing, _SILENT):
            return
        state = self._state(thing)
        if isinstance(state, str):  # a name: a function in C, a cached function
            self.words.append(f"{getattr(thing, '__module__', '')}.{state}")
            self.visit(getattr(thing, "__wrapped__", None))
            return
        self.visit(state[:3])
        for items in state[3:5]:
            self.visit(None if items is None else list(items))

    def _state(self, thing: Any) -> Any:
        """Return an object's name, or its constructor, arguments, state and items.

        Raises:
            TypeError: if it has none of that.
        """
        reduce = copyreg.dispatch_table.get(type(thing))
        try:
            return thing.__reduce_ex__(4) if reduce is None else reduce(thing)
        except Exception as error:  # whatever its class raises
            if isinstance(thing, Mapping):
                return type, (), dict(thing)
            place = f"`{' > '.join(filter(None, self._path))}` is" if self._path else "Got"
            raise TypeError(
                f"{place} a {type(thing).__module__}.{type(thing).__qualname__}, "
                f"whose state cannot be read ({error}): a stored result could be out of date. Accepted are "
                "functions, classes, plain values, tensors, arrays, containers and objects that can be "
                "pickled. Make it inside the function that uses it, or give no `cache_dir`."
            ) from error


def is_library(module: str | None) -> bool:
    """Return whether a module is of Python, of an installed package or of this one."""
    if not module or module.split(".")[0] in {"builtins", "lightning_influence"}:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module != "__main__"
    return str(Path(file).resolve()).startswith(_LIBRARIES)


def source_of(thing: Any) -> str:
    """Return the source text of a function or class, empty where there is none."""
    try:
        # Through the code: a function with functools.wraps would give the source of what it wraps.
        return inspect.getsource(thing.__code__ if isinstance(thing, FunctionType) else thing)
    except (OSError, TypeError):
        return ""


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _array(value: Any) -> str:
    if getattr(value.dtype, "hasobject", False):
        return repr(value.tolist())
    return content(value)


def _under_own_name(name: str, value: Any) -> bool:
    """Return whether a global is a library, or a function or class of one, under its own name."""
    if isinstance(value, ModuleType):
        return is_library(value.__name__) and value.__name__.split(".")[-1] == name
    own = getattr(value, "__qualname__", None) == name
    return own and isinstance(value, type | FunctionType) and is_library(value.__module__)


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _bytecode(code: CodeType) -> str:
    """Return a code object in words that are the same in every process."""
    return f"{code.co_code.hex()} {code.co_names} {_constants(code.co_consts)}"


def _constants(values: Iterable[Any]) -> list[str]:
    return [
        _bytecode(value)
        if isinstance(value, CodeType)
        else str(sorted(map(repr, value)))
        if isinstance(value, frozenset)
        else repr(value)
        for value in values
    ]


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
