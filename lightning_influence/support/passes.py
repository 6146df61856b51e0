"""What passes need of the data and of whoever runs them."""

from __future__ import annotations

from collections.abc import Sequence
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

    def parts(self, count: int) -> Sequence[Loader]:
        """Loaders of at most ``count`` examples each, or a few more, in the order of visiting."""
        ...

    def sample(self, count: int, seed: int) -> Loader:
        """About ``count`` examples drawn at random, the same for the same seed."""
        ...

    def holding(self, indices: Tensor) -> Loader:
        """These examples, and others where single examples cannot be asked for."""
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

    def run(self, one_pass: Any, dataloaders: Any) -> Any:
        """Run one pass."""
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
