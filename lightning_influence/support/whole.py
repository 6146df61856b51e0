"""Parameters of which this process holds a part only, read whole for as long as somebody looks at them.

Strategies that shard parameters leave each process a part of them. Passes put *stand-ins* in their place:
parameters of the whole shape whose values are there while the module that owns them runs, and NaN otherwise,
so that nobody takes them for values by mistake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_FETCH = "_influence_fetch"


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is distributed over processes (a ``DTensor``)."""
    return hasattr(tensor, "full_tensor")


def is_of_fsdp(hook: object) -> bool:
    """Return whether a hook on a module or a tensor is one of those with which FSDP gathers parameters."""
    owner = getattr(hook, "__self__", None)
    places = (getattr(hook, "__module__", None), type(owner).__module__)
    return any("fsdp" in (place or "").split(".") or "_fsdp" in (place or "") for place in places)


def mark_stand_in(parameter: Tensor, fetch: Callable[[], Tensor]) -> None:
    """Say that a parameter stands in for a sharded one.

    Args:
        parameter: the stand-in.
        fetch: returns the values; processes may ask at different places, see the runner that made it.
    """
    setattr(parameter, _FETCH, fetch)


def is_stand_in(tensor: Tensor) -> bool:
    """Return whether a tensor stands in for a sharded parameter."""
    return hasattr(tensor, _FETCH)


def holds_stand_ins(module: nn.Module) -> bool:
    """Return whether parts of a module's parameters are with other processes."""
    return any(map(is_stand_in, module.parameters()))


@torch.no_grad()
def read_whole(tensor: Tensor) -> Tensor:
    """Return the values of a tensor: its own, or those of the parameter that it is a part of.

    Args:
        tensor: any tensor. Of a sharded one all processes have to ask, in the same order.
    """
    fetch: Any = getattr(tensor, _FETCH, None)
    if fetch is not None:
        found: Tensor = fetch()
        return found
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def read_own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: all of it, or its part of a sharded one."""
    local: Any = getattr(tensor, "to_local", None)
    if local is None:
        return tensor
    with torch.no_grad():
        part: Tensor = local()
    return part


@contextlib.contextmanager
def made_whole(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A context in which those of some tensors that are stand-ins hold their values."""
    parts = {id(tensor): tensor for tensor in tensors if is_stand_in(tensor)}
    before = [(part, part.data) for part in parts.values()]
    try:
        for part, _ in before:
            part.data = read_whole(part)
        yield
    finally:
        for part, data in before:
            part.data = data
