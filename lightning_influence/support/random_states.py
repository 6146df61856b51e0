"""Random states, put back after something of the user's has drawn from them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Put the global random states (torch on CPU and CUDA, NumPy, Python) back on exit."""
    initialized: Callable[[], bool] = torch.cuda.is_initialized
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


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
