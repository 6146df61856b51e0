"""What passes need of the data and of whoever runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Loader(Protocol):
    """Training examples that can be subsampled."""

    @property
    def indices(self) -> Tensor:
        """Dataset indices in the order of visiting, ``(N,)``."""
        ...

    @property
    def num_examples(self) -> int:
        """``N``."""
        ...

    def __len__(self) -> int:
        """Number of batches on one process."""
        ...

    @property
    def size(self) -> int | None:
        """Length of the dataset, None if it is not known."""
        ...

    @property
    def batches(self) -> Sequence[Tensor]:
        """Dataset indices of each batch, ``(B,)``, in the order of visiting."""
        ...

    @property
    def repeats(self) -> bool:
        """Whether the user's batches hold examples that came before, of which these are without."""
        ...

    def in_batches(self) -> Loader:
        """The same loader, but one whose parts and shares are of whole batches."""
        ...

    def parts(self, count: int) -> Sequence[Loader]:
        """Loaders of at most ``count`` examples each, or a few more, in the order of visiting."""
        ...

    def sample(self, count: int, seed: int) -> Loader:
        """About ``count`` examples drawn at random, the same for the same seed."""
        ...

    def holding(self, indices: Tensor) -> Loader:
        """These examples, and others where single examples cannot be asked for."""
        ...

    def with_any(self, indices: Tensor) -> Loader:
        """The batches that hold any of these examples, as they are."""
        ...


@dataclass(frozen=True)
class Parcel:
    """What one process sends to another.

    Attributes:
        note: primitives that say what the tensors are.
        tensors: the tensors.
    """

    note: Any
    tensors: Sequence[Tensor]


class Exchange(Protocol):
    """Lets processes work together in mid-pass, whatever batch each of them is at."""

    def join(self) -> None:
        """Wait until all who have batches left join; who has none helps, see :meth:`Passes.run`."""
        ...

    def swap(self, outgoing: Sequence[Parcel], error: Exception | None = None) -> list[Parcel]:
        """Send a parcel to each process, and return what each has sent; raise an error on all."""
        ...


class Passes(Protocol):
    """Runs passes over loaders, on one process or several."""

    @property
    def module(self) -> Any:
        """The user's module."""
        ...

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes that share a pass."""
        ...

    @property
    def exchange(self) -> Exchange | None:
        """Lets processes that share parameters work together in mid-pass; None where each works alone."""
        ...

    def run(self, one_pass: Any, dataloaders: Any) -> Any:
        """Run one pass; a process without batches left calls its ``help()`` while others join."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        ...

    def raise_together(self, error: Exception | None) -> None:
        """Raise on all processes the error that one of them has."""
        ...

    def all_gather_cat(self, tensor: Tensor) -> Tensor:
        """All processes' tensors joined along the first dimension."""
        ...
