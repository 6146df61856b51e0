"""What the processes of a distributed run tell each other: sums, failures, and tensors in mid-pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_influence.support.errors import InfluenceError
from lightning_influence.support.passes import Parcel


def sum_over_processes(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a tensor over the processes, computed in place.

    Args:
        tensor: this process's part, of any shape and on any device.
        device: where the processes communicate.
    """
    buffer = tensor.to(device).contiguous()
    dist.all_reduce(buffer)
    return tensor if buffer is tensor else tensor.copy_(buffer)


_WAITS, _FAILED, _JOINS = -1, -2, -3


class Meeting:
    """Where processes that are at different places of a pass find each other.

    Collectives need every process at the same one, and in a pass processes are not: they have other numbers
    of batches, and check other ones. So every process that needs something of the others says what, in a
    round in which all take part; then all serve each wish of the round, and who got what it wished for goes
    on. Who has nothing left to do waits, and serves the others until all wait. Work of all together begins
    when all who do not wait join; who waits helps. Who fails says so, and all raise.

    Args:
        device: where the processes communicate.
        serve: computes, with all processes, what a number stands for.

    Attributes:
        helper: does the part of a process without batches in work of all together.
    """

    def __init__(self, device: torch.device, serve: Callable[[int], Sequence[Tensor]] | None = None) -> None:
        self._device, self._serve = device, serve
        self.helper: Callable[[], object] | None = None
        self._has_joined = False  # as a helper, by waiting
        self._failure: Exception | None = None  # after which nobody comes here any more

    def ask(self, number: int) -> Sequence[Tensor]:
        """Return what a number stands for, computed by all processes together.

        Raises:
            InfluenceError: if another process has failed.
        """
        return self._serve_all(self._tell(number))[number]

    def wait(self) -> None:
        """Serve the other processes until all wait.

        Raises:
            InfluenceError: if another process has failed.
        """
        while wishes := self._tell(_WAITS):
            if not self._serve_all(wishes):
                assert self.helper is not None
                self._has_joined = True
                try:
                    self.helper()
                except Exception as error:  # the others go on, and hear of it in the next round
                    self.fail(error)

    def join(self) -> None:
        """Wait until all who do not wait for the end join.

        Raises:
            InfluenceError: if another process has failed.
        """
        while not self._has_joined and self._serve_all(self._tell(_JOINS)):
            pass
        self._has_joined = False

    def swap(self, outgoing: Sequence[Parcel], error: Exception | None = None) -> list[Parcel]:
        """Send a parcel to each process, and return what each has sent; after :meth:`join`.

        Args:
            outgoing: a parcel for each process.
            error: of this process, None if all is well.

        Returns:
            The parcel of each process.

        Raises:
            Exception: this process's error.
            InfluenceError: another one's.
        """
        forms = [(p.note, [(t.shape, t.dtype) for t in p.tensors]) for p in outgoing]
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, forms)
        self._raise_together(error)
        mine, operations, found = dist.get_rank(), [], []
        for rank, forms_of in enumerate(told):
            note, shapes = forms_of[mine]
            arriving = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in shapes]
            leaving = [tensor.to(self._device).contiguous() for tensor in outgoing[rank].tensors]
            if rank == mine:
                arriving = leaving
            else:
                for kind, tensors in ((dist.isend, leaving), (dist.irecv, arriving)):
                    some = [(tag, tensor) for tag, tensor in enumerate(tensors) if tensor.numel()]
                    operations += [dist.P2POp(kind, tensor, rank, tag=tag) for tag, tensor in some]
            found.append(Parcel(note, arriving))
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        return found

    def _serve_all(self, wishes: set[int]) -> dict[int, Sequence[Tensor]]:
        """Compute with all processes what the wishes of a round stand for."""
        found = {}
        for wish in sorted(wishes - {_JOINS}):
            assert self._serve is not None
            found[wish] = self._serve(wish)
        return found

    def fail(self, error: Exception) -> NoReturn:
        """Tell the others of an error, and raise it.

        Raises:
            Exception: the error.
        """
        with contextlib.suppress(Exception):  # the others may be gone already, or have failed first
            self._tell(_FAILED, error)
        raise error

    def _tell(self, wish: int, error: Exception | None = None) -> set[int]:
        """Tell the others of a wish.

        Returns:
            The wishes of all processes.

        Raises:
            InfluenceError: if another process has failed.
        """
        if self._failure is not None:  # raised before, and caught by somebody who was not meant
            raise self._failure
        own = torch.tensor([wish], device=self._device)
        told = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(told, own)
        wishes = set(torch.cat(told).tolist())
        if _FAILED in wishes:
            self._raise_together(error)
        return wishes - {_WAITS}

    def _raise_together(self, error: Exception | None) -> None:
        try:
            raise_together(error)
        except Exception as failure:
            self._failure = failure
            raise


def raise_together(error: Exception | None) -> None:
    """Raise an error on all processes if there is one on any; all of them have to call it.

    Args:
        error: of this process, None if all is well.

    Raises:
        Exception: this process's error.
        InfluenceError: another one's, of its kind where that is one of this library's.
    """
    told: list[tuple[type[InfluenceError], str] | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(told, None if error is None else _describe(error))
    finally:  # the others may be gone already
        if error is not None:
            raise error
    for rank, failure in enumerate(told):
        if failure is not None:
            kind, text = failure
            raise kind(f"Process {rank} of {len(told)} has failed, and all end with it: {text}")


def _describe(error: Exception) -> tuple[type[InfluenceError], str]:
    """Return an error in a form that other processes can raise."""
    if isinstance(error, InfluenceError):
        return type(error), str(error)
    return InfluenceError, f"{type(error).__name__}: {error}"
