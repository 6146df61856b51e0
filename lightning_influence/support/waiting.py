"""What is computed on an accelerator and read later, so that the program does not wait for every number.

An accelerator works behind the program's back until a value is read; then the program waits, and afterwards
the accelerator does, for new work. On the CPU everything is read at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor

# Chosen by hand: values that wait to be read at most, about 16 batches of a pass; and what they may take.
_MOST, _MOST_BYTES = 96, 2**26


class LaterSum:
    """A sum of numbers from batches, in double precision, which is read when it is asked for.

    Args:
        value: what it begins with.
    """

    def __init__(self, value: float = 0.0) -> None:
        self._value = value
        self._waiting: Tensor | None = None

    def add(self, number: Tensor) -> None:
        """Add a tensor's single number; on an accelerator nobody waits for it."""
        number = number.detach().double()
        if number.is_cpu:
            self._value += float(number)
        else:
            self._waiting = number if self._waiting is None else self._waiting + number

    def read(self) -> float:
        """Return the sum."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._value += float(waiting)
        return self._value


class SummedLater:
    """An attribute of a dataclass that is a float to those who read or set it, and a :class:`LaterSum`.

    Numbers are added to the latter by :func:`add_later`.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, owner: object | None, kind: type | None = None) -> float:
        """Return the sum; of the class, what the attribute is without a value."""
        if owner is None:
            return 0.0
        found: LaterSum = getattr(owner, self._name)
        return found.read()

    def __set__(self, owner: object, value: float) -> None:
        """Begin a new sum with a value."""
        setattr(owner, self._name, LaterSum(value))


def add_later(owner: object, name: str, number: Tensor) -> None:
    """Add a tensor's single number to an attribute that is a :class:`SummedLater`."""
    found: LaterSum = getattr(owner, f"_{name}")
    found.add(number)


class _Queue:
    """Copies that are on their way to the CPU, and what takes them there."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Callable[[Tensor], object]]] = []
        self._devices: set[torch.device] = set()
        self._bytes = 0

    def put(self, tensor: Tensor, take: Callable[[Tensor], object]) -> None:
        # Copies that nobody waits for go into pinned memory, which torch takes and keeps for the next ones.
        self._kept.append((tensor.to("cpu", non_blocking=True), take))
        self._devices.add(tensor.device)
        self._bytes += tensor.nbytes
        if len(self._kept) >= _MOST or self._bytes >= _MOST_BYTES:
            self.settle()

    def settle(self) -> None:
        kept, devices = self._kept, self._devices
        self._kept, self._devices, self._bytes = [], set(), 0
        for device in devices:
            torch.get_device_module(device).synchronize()
        for copy, take in kept:
            take(copy)


_queues: list[_Queue] = []


@contextlib.contextmanager
def reading_later() -> Iterator[None]:
    """A context in which :func:`read_later` defers what it is given, to its end at the latest."""
    queue = _Queue()
    _queues.append(queue)
    try:
        yield
        queue.settle()
    except Exception:
        queue.settle()  # what is not finite may be what something else has failed of
        raise
    finally:
        _queues.remove(queue)


def read_later(tensor: Tensor, take: Callable[[Tensor], object]) -> None:
    """Hand a tensor's values over on the CPU: at once, or, from an accelerator, a few batches later.

    Args:
        tensor: detached; it is not to be changed afterwards.
        take: gets the values.
    """
    if tensor.is_cpu or not _queues:
        take(tensor.cpu())
    else:
        _queues[-1].put(tensor, take)


def expect(holds: Tensor, refuse: Callable[[], NoReturn]) -> None:
    """Refuse, now or a few batches later, unless a tensor's single truth value is true.

    Args:
        holds: what has to be true.
        refuse: raises the error; what it refers to is kept until then.
    """

    def take(found: Tensor) -> None:
        if not bool(found):
            refuse()

    read_later(holds, take)


def settle() -> None:
    """Read everything that was deferred in the innermost :func:`reading_later`."""
    if _queues:
        _queues[-1].settle()
