"""Random states, put back after something of the user's has drawn from them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True)
class RandomStates:
    """The global random states: torch on CPU and CUDA, NumPy, Python."""

    torch: Tensor
    numpy: Any
    python: Any
    cuda: list[Tensor] | None

    @classmethod
    def read(cls) -> Self:
        """Return the states as they are."""
        initialized: Callable[[], bool] = torch.cuda.is_initialized
        cuda = torch.cuda.get_rng_state_all() if initialized() else None
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate(), cuda)

    def write(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Put the global random states back on exit."""
    states = RandomStates.read()
    try:
        yield
    finally:
        states.write()


@contextlib.contextmanager
def preserve_generators(*owners: object) -> Iterator[None]:
    """Put the states of the generators that these objects hold back on exit."""
    found = [g for owner in owners if owner is not None for g in getattr(owner, "__dict__", {}).values()]
    saved = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in saved:
            generator.set_state(state)
