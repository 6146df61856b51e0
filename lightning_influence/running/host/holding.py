"""The content of values that can change in place, held by the kind of value and put back.

Values are followed through containers, objects, slots, functions, closures and unregistered modules, the
nearest first. What cannot be held is left as it is: open files, iterators, locks, classes, and objects of
libraries other than the kinds named here.
"""

from __future__ import annotations

import array
import contextlib
import functools
import operator
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_influence.running.host.packages import find_package
from lightning_influence.support.random_states import hold_generator, is_generator
from lightning_influence.support.whole import read_own_part

PutBack = Callable[[], object]
# Chosen by hand: values that are looked into, about a tenth of a second's work. A container of more is held
# itself, and what lies in it beyond them is not.
_MOST = 2**15
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None), range, type})
_DATA = (Dataset, DataLoader, Sampler, np.memmap)
_LIBRARIES = frozenset({"torch", "numpy", "lightning", "pytorch_lightning", "torchmetrics", "transformers"})
# Of the standard library's classes those that only hold values; others stand for what lies outside.
_HOLDERS = frozenset({"array", "collections", "functools", "types", "argparse", "queue", "random"})
_NOT_FOLLOWED = _LIBRARIES | (sys.stdlib_module_names - _HOLDERS - {"__main__"})


def hold(values: Iterable[Any], known: Iterable[Any], *, parameters: bool = True) -> PutBack:
    """Hold the content of values, and of all that is reached from them.

    Args:
        values: where to begin.
        known: what is held elsewhere, and is neither held nor followed.
        parameters: whether parameters of modules that are reached are held.

    Returns:
        Puts everything back, in the objects that held it.
    """
    seen = {id(value): value for value in known}  # with the values, whose identities others could take else
    waiting, undo, count = deque(values), list[PutBack](), 0
    while waiting and count < _MOST:
        value = waiting.popleft()
        if type(value) in _PLAIN or id(value) in seen:
            continue
        seen[id(value)] = value
        count += 1
        if not parameters and isinstance(value, nn.Parameter):
            continue
        with contextlib.suppress(Exception):  # what cannot be held is left as it is
            for put_back, inside in _open(value):
                undo.append(put_back)
                if not _PLAIN.issuperset(map(type, inside)):
                    waiting.extend(inside)
    return functools.partial(put_all_back, undo)


def put_all_back(parts: Iterable[PutBack]) -> None:
    """Put everything back, also after one part could not be; its error is raised in the end."""
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.callback(part)


def equal_to_the_bit(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same to the bit, wherever they are."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    other = other.to(one.device)
    return torch.equal(one, other) or (
        one.is_floating_point() and torch.equal(one.nan_to_num(), other.nan_to_num())
    )


@functools.lru_cache(maxsize=1024)  # modules of one kind have the same attributes, and a model has many
def _name_machinery(attributes: tuple[str, ...], is_lightning: bool) -> frozenset[str]:
    names = {"log", "log_dict", "training", "_compiled_call_impl", "_is_full_backward_hook"}
    own = {name for name in attributes if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))}
    known = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_backward_pre_hooks"}
    if is_lightning:
        known |= {"_trainer", "_fabric", "_fabric_optimizers", "_device", "_dtype", "_current_fx_name"}
        known |= {"_hparams_initial", "_hparams_name", "_jit_is_scripting", "_device_mesh"}
    return frozenset(names | own | known)


def hold_attributes(module: nn.Module) -> tuple[PutBack, list[Any]]:
    """Hold what a module's author keeps in plain attributes; the machinery of torch and Lightning is not.

    Args:
        module: any module.

    Returns:
        What puts the attributes back, and their values.
    """
    is_lightning = isinstance(getattr(module, "_fabric_optimizers", None), list)
    machinery = _name_machinery(tuple(vars(module)), is_lightning)
    own = {name: value for name, value in vars(module).items() if name not in machinery}

    def put_back() -> None:
        for name in [name for name in vars(module) if name not in machinery and name not in own]:
            del vars(module)[name]
        vars(module).update(own)

    return put_back, list(own.values())


_Part = tuple[PutBack, list[Any]]


def _open(value: Any) -> Iterator[_Part]:
    """Yield what puts the parts of a value back, each with the values in it."""
    if isinstance(value, Tensor):
        if not is_lazy(value):
            yield _hold_tensor(value), []
    elif isinstance(value, nn.Module):
        yield hold_attributes(value)
        for part in (value._parameters, value._buffers, value._modules):
            yield _hold_mapping(part)
    elif isinstance(value, np.ndarray):
        if value.flags.writeable and not isinstance(value, np.memmap):
            yield functools.partial(np.copyto, value, value.copy()), _items_of(value)
    elif not isinstance(value, (*_DATA, type, types.ModuleType)) and find_package(value) is None:
        yield from _open_kind(value)
        yield from _open_object(value)


def _items_of(value: Any) -> list[Any]:
    return value.ravel().tolist() if value.dtype == object else []


def _open_kind(value: Any) -> Iterator[_Part]:
    """Yield what a generator or a container holds beside its attributes."""
    if is_generator(value):
        yield hold_generator(value), []
    if isinstance(value, bytearray | array.array):
        yield functools.partial(value.__setitem__, slice(None), value[:]), []
    for kind, read_items in _FIXED:
        if isinstance(value, kind):
            yield _nothing, read_items(value)
    if isinstance(value, dict):
        yield _hold_mapping(value)
    for kind, clear, extend in _COLLECTIONS:
        if isinstance(value, kind):
            yield _hold_items(value, kind, clear, extend)


# What lies in values that themselves do not change.
_FIXED: tuple[tuple[Any, Callable[[Any], list[Any]]], ...] = (
    (tuple | frozenset, list),
    (functools.partial, lambda value: [value.func, value.args, value.keywords]),
    (types.MethodType, lambda value: [value.__self__, value.__func__]),
)
_COLLECTIONS: tuple[tuple[Any, Any, Any], ...] = (
    (list, list.clear, list.extend),
    (deque, deque.clear, deque.extend),
    (set, set.clear, set.update),
)


def _open_object(value: Any) -> Iterator[_Part]:
    """Yield what an object of the user's holds in attributes, slots and closures."""
    kind = type(value)
    where = value.__module__ if isinstance(value, types.FunctionType) else kind.__module__
    if not isinstance(where, str) or where.partition(".")[0] in _NOT_FOLLOWED:
        return
    if isinstance(getattr(value, "__dict__", None), dict):
        yield _hold_mapping(value.__dict__)
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            yield _hold_slot(cell, types.CellType.cell_contents)
        return
    for base in kind.__mro__:
        if "__slots__" not in vars(base):
            continue
        for member in list(vars(base).values()):
            if isinstance(member, types.MemberDescriptorType):
                yield _hold_slot(value, member)


def _hold_tensor(value: Tensor) -> PutBack:
    data = read_own_part(value.data)
    copy = data.clone()

    def put_back() -> None:
        if not equal_to_the_bit(data, copy):
            data.copy_(copy)

    return put_back


def _hold_mapping(value: dict[Any, Any]) -> _Part:
    """Hold a dictionary, without what a class of the user's does when it is written to."""
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    items = dict(kind.items(value))

    def put_back() -> None:
        now = dict(kind.items(value))
        if _are_same(now.keys(), items.keys()) and _are_same(now.values(), items.values()):
            return
        kind.clear(value)
        for key, item in items.items():
            kind.__setitem__(value, key, item)

    return put_back, [*items.values()]


def _hold_items(value: Any, kind: Any, clear: Any, extend: Any) -> _Part:
    """Hold a collection, without what a class of the user's does when it is written to."""
    items = list(kind.__iter__(value))

    def put_back() -> None:
        if not _are_same(list(kind.__iter__(value)), items):
            clear(value)
            extend(value, items)

    return put_back, items


def _are_same(some: Collection[Any], others: Collection[Any]) -> bool:
    """Tell whether two collections hold the same objects in the same order."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


_MISSING = object()


def _hold_slot(owner: Any, member: Any) -> _Part:
    """Hold one slot of an object, or the variable of a closure."""

    def read() -> Any:
        try:
            return member.__get__(owner)
        except (AttributeError, ValueError):  # it is empty
            return _MISSING

    held = read()

    def put_back() -> None:
        if read() is held:
            return
        if held is _MISSING:
            member.__delete__(owner)
        else:
            member.__set__(owner, held)

    return put_back, [held]


def _nothing() -> None:
    """Put back what cannot change."""
