"""Modules that ``fully_shard`` has spread over processes (FSDP2), lent to passes without its own hooks.

FSDP gathers a module's parameters when it is called, with a collective that all processes have to reach in
the same order. In passes they do not: they have other numbers of batches, and look at some batches several
times. For the time of a pass, *stand-ins* take the place of the parameters, in the same groups: filled when
the module of the group is called and emptied after it, and gathered anew where a backward pass needs them,
through a :class:`~.processes.Meeting` that wants no order.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.running.host.processes import Meeting
from lightning_influence.running.host.whole_shards import make_whole
from lightning_influence.support.errors import UnsupportedTrainerError
from lightning_influence.support.whole import is_of_fsdp, is_sharded, mark_stand_in

# Groups whose values are kept after their use: what a backward pass begins with, and goes on to.
_KEPT = 2


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on a module itself."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


@dataclass
class _Group:
    """Parameters that are gathered together.

    Attributes:
        module: whose call needs them.
        sharded: this process's parts of them.
        stand_ins: what takes their places.
        places: the modules and names of each.
        calls: how many calls of the module are under way.
    """

    module: nn.Module
    sharded: list[Tensor] = field(default_factory=list)
    stand_ins: list[nn.Parameter] = field(default_factory=list)
    places: list[list[tuple[nn.Module, str]]] = field(default_factory=list)
    calls: int = 0

    def add(self, sharded: Tensor, stand_in: nn.Parameter, owner: nn.Module, name: str) -> None:
        """Take a parameter up, in one more place if it is there already."""
        known = [part is stand_in for part in self.stand_ins]
        if not any(known):
            known.append(True)
            self.sharded.append(sharded)
            self.stand_ins.append(stand_in)
            self.places.append([])
        self.places[known.index(True)].append((owner, name))


class Shards:
    """The sharded parameters of a module.

    Args:
        module: the user's module.
        device: where the processes communicate.

    Attributes:
        meeting: where processes gather parameters.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._owners = [part for part in module.modules() if is_fully_sharded(part)]
        self._groups = _find_groups(module, self._owners)
        self._kept: OrderedDict[int, Sequence[Tensor]] = OrderedDict()
        self._filled: dict[int, tuple[int, int]] = {}  # storages -> where their values are from
        self._users: Counter[int] = Counter()  # of each stand-in, groups that are under way
        self.meeting = Meeting(device, self._gather)
        for number, group in enumerate(self._groups):
            for place, stand_in in enumerate(group.stand_ins):
                mark_stand_in(stand_in, functools.partial(self._find, number, place))

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """A context in which stand-ins take the parameters' places, and FSDP's hooks are off."""
        with contextlib.ExitStack() as stack:
            for owner in self._owners:  # also those all of whose parameters are in others
                stack.enter_context(_without_fsdp_hooks(owner))
            for number, group in enumerate(self._groups):
                for places, stand_in in zip(group.places, group.stand_ins, strict=True):
                    for owner, name in places:
                        # Not into the table of parameters: recurrent modules keep a list of their own.
                        stack.callback(setattr, owner, name, owner._parameters[name])
                        setattr(owner, name, stand_in)
                contexts: list[Any] = []
                enter = functools.partial(self._enter, number, contexts)
                leave = functools.partial(self._leave, number, contexts)
                before = group.module.register_forward_pre_hook(enter, prepend=True)
                stack.callback(before.remove)
                after = group.module.register_forward_hook(leave, always_call=True)
                stack.callback(after.remove)
            stack.callback(self._kept.clear)
            yield

    def _enter(self, number: int, contexts: list[Any], module: nn.Module, args: Any) -> None:
        with torch._C.DisableTorchFunction():
            group = self._groups[number]
            if not any(other.calls for other in self._groups):
                self._kept.clear()  # which served the backward pass of the forward pass before
            group.calls += 1
            if group.calls == 1:
                values = self._fetch(number)
                for place, (stand_in, value) in enumerate(zip(group.stand_ins, values, strict=True)):
                    self._users[id(stand_in)] += 1
                    if self._users[id(stand_in)] == 1:
                        stand_in.data = value
                        self._filled[value.untyped_storage()._cdata] = number, place
            hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            contexts.append(hooks)
            hooks.__enter__()

    def _leave(self, number: int, contexts: list[Any], module: nn.Module, args: Any, output: Any) -> None:
        with torch._C.DisableTorchFunction():
            group = self._groups[number]
            if contexts:
                contexts.pop().__exit__(None, None, None)
            group.calls -= 1
            if not group.calls:
                for stand_in in group.stand_ins:
                    self._users[id(stand_in)] -= 1
                    if not self._users[id(stand_in)]:
                        self._filled.pop(stand_in.untyped_storage()._cdata, None)
                        stand_in.data = _no_values(stand_in)

    def _pack(self, saved: Tensor) -> Any:
        """Keep of a parameter where its values are from; a graph would hold all of them otherwise."""
        place = self._filled.get(saved.untyped_storage()._cdata) if saved.layout is torch.strided else None
        if place is None:
            return saved, saved._version
        return place, saved.size(), saved.stride(), saved.storage_offset(), saved.dtype

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed[0], Tensor):
            saved, version = packed
            if saved._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace "
                    f"operation: a tensor of shape {tuple(saved.shape)} is at version {saved._version}; "
                    f"expected version {version}"
                )
            found: Tensor = saved
            return found
        (number, place), size, stride, offset, dtype = packed
        with torch.no_grad(), torch._C.DisableTorchFunction():
            whole: Tensor = self._fetch(number)[place].view(dtype)
            return whole.as_strided(size, stride, offset)

    def _fetch(self, number: int) -> Sequence[Tensor]:
        """Return the values of a group."""
        found = self._kept.pop(number, None)
        if found is None:
            found = self.meeting.ask(number)
        self._kept[number] = found
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    @torch.no_grad()
    def _gather(self, number: int) -> list[Tensor]:
        return make_whole(self._groups[number].sharded)

    def _find(self, number: int, place: int) -> Tensor:
        """Return the values of one parameter."""
        return self._fetch(number)[place]


def _find_groups(module: nn.Module, owners: Sequence[nn.Module]) -> list[_Group]:
    """Find the parameters that each call of a sharded module gathers, and make their stand-ins.

    Returns:
        The groups.

    Raises:
        UnsupportedTrainerError: if a sharded parameter is in no module that ``fully_shard`` was called on.
    """
    for part in owners:
        part.reshard()  # type: ignore[operator]  # a forward pass without a backward pass leaves them whole
    groups: dict[nn.Module, _Group] = {}
    stand_ins: dict[int, nn.Parameter] = {}
    todo: list[tuple[nn.Module, nn.Module | None]] = [(module, None)]
    seen: set[int] = set()
    while todo:
        part, owner = todo.pop()
        owner = part if part in owners else owner
        if id(part) in seen:
            continue
        seen.add(id(part))
        for name, parameter in part._parameters.items():
            if parameter is None or not is_sharded(parameter):
                continue
            if owner is None:
                raise UnsupportedTrainerError(
                    f"The parameter {name!r} of a {type(part).__name__} is distributed, and fully_shard was "
                    "called on no module that it is in; accepted are parameters that fully_shard shards."
                )
            if id(parameter) not in stand_ins:
                values = _no_values(parameter)
                stand_ins[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            group = groups.setdefault(owner, _Group(owner))
            group.add(parameter.detach(), stand_ins[id(parameter)], part, name)
        todo += [(child, owner) for child in part.children()]
    return list(groups.values())


def _no_values(like: Tensor) -> Tensor:
    """Return a tensor of NaN of the shape of another one, which takes the memory of one number."""
    nan = torch.full((), torch.nan, dtype=like.dtype, device=like.device)
    return nan.expand(like.shape)


@contextlib.contextmanager
def _without_fsdp_hooks(module: nn.Module) -> Iterator[None]:
    """Take the hooks that FSDP put on a module's forward pass off, for the time of the block."""
    tables: list[Any] = [module._forward_pre_hooks, module._forward_hooks]
    before = [list(table.items()) for table in tables]
    for table, items in zip(tables, before, strict=True):
        for key, hook in items:
            if is_of_fsdp(hook):
                del table[key]
    try:
        yield
    finally:
        for table, items in zip(tables, before, strict=True):
            own = dict(items)
            added = [(key, hook) for key, hook in table.items() if key not in own]
            table.clear()
            table.update([*items, *added])
