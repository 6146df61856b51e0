"""Random states, put back after something of the user's has drawn from them; draws that need no state.

A draw that is a function of a seed, an index and a number is the same in whatever order, batch or process its
index comes. The function is the output of splitmix64 (Steele, Lea and Flood 2014): a counter times an odd
number, mixed by shifts and multiplications until every bit depends on all.
"""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

_GENERATORS = (
    torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random
)  # fmt: skip
# The odd increment of the counter and the two multipliers of the mix, as 64-bit integers with a sign.
_STEP, _FIRST, _SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


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
        cuda = torch.cuda.get_rng_state_all() if _is_cuda_initialized() else None
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate(), cuda)

    def have_moved(self) -> bool:
        """Return whether something has drawn since, but for NumPy generators of another kind."""
        now, legacy = self.read(), isinstance(self.numpy, tuple)
        same = torch.equal(self.torch, now.torch) and self.python == now.python
        same &= not legacy or (
            np.array_equal(self.numpy[1], now.numpy[1]) and self.numpy[2:] == now.numpy[2:]
        )
        return not same or not all(map(torch.equal, self.cuda or [], now.cuda or []))

    def write(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)


@dataclass(frozen=True)
class Seeds:
    """A seed for each of the global generators: torch on all devices, NumPy, Python."""

    torch: int
    numpy: int
    python: int

    @classmethod
    def draw(cls) -> Self:
        """Return seeds that depend on the states as they are, each on that of its own generator."""
        return cls(int(torch.randint(2**32, ())), int(np.random.randint(2**31)), random.getrandbits(32))

    def derive(self, key: bytes) -> Self:
        """Return seeds that depend on these and on a key."""
        parts = (self.torch, self.numpy, self.python)
        return type(self)(*(zlib.crc32(key, seed) for seed in parts))

    def apply(self) -> None:
        """Seed the generators, which takes a tenth of the time of putting states back."""
        global _applied
        _applied = self
        torch.default_generator.manual_seed(self.torch)
        if _is_cuda_initialized():
            for generator in torch.cuda.default_generators:
                generator.manual_seed(self.torch)
        with contextlib.suppress(TypeError):  # the user has set a generator that takes no seed
            np.random.seed(self.numpy)
        random.seed(self.python)


# The seeds that what runs now began with; None where it began with the user's own states.
_applied: Seeds | None = None


def remember_draws() -> Callable[[], None]:
    """Return what lets the code that comes next draw what it would draw now, however often it is called.

    In a pass that is what the batch began with.
    """
    return RandomStates.read().write if _applied is None else _applied.apply


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Put the global random states back on exit."""
    global _applied
    states, applied = RandomStates.read(), _applied
    try:
        yield
    finally:
        states.write()
        _applied = applied


def is_generator(value: object) -> bool:
    """Return whether a value is a random generator of torch, NumPy or Python that has a state."""
    return isinstance(value, _GENERATORS) and not isinstance(value, random.SystemRandom)


def hold_generator(generator: Any) -> Callable[[], object]:
    """Return what puts a generator into the state that it has now, whatever its class overrides."""
    if isinstance(generator, torch.Generator):
        return partial(torch.Generator.set_state, generator, torch.Generator.get_state(generator))
    if isinstance(generator, random.Random):
        return partial(random.Random.setstate, generator, random.Random.getstate(generator))
    if isinstance(generator, np.random.RandomState):
        state = np.random.RandomState.get_state(generator, legacy=False)
        return partial(np.random.RandomState.set_state, generator, state)
    owner = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return partial(setattr, owner, "state", owner.state)


def _is_cuda_initialized() -> bool:
    initialized: Callable[[], bool] = torch.cuda.is_initialized
    return initialized()


def hash_numbers(keys: Tensor, count: int) -> Tensor:
    """Return random 64-bit integers that depend on their key and their place alone.

    Args:
        keys: any integers, ``(B,)`` int64; different ones give independent rows.
        count: how many of each key.

    Returns:
        ``(B, count)`` int64, uniform over all 64 bits.
    """
    places = torch.arange(1, count + 1, device=keys.device)
    return _mix(keys[:, None] + places * _STEP)


def combine_keys(keys: Tensor, number: int) -> Tensor:
    """Return keys ``(B,)`` that depend on other keys and a number."""
    # A CPU tensor of one number goes with tensors of any device, as a number does.
    return _mix(keys ^ _mix(torch.tensor(number + 1) * _STEP))


def _mix(numbers: Tensor) -> Tensor:
    """Return a bijection of 64-bit integers that changes about half of the bits for every bit changed."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        numbers = (numbers ^ _shift(numbers, shift)) * factor
    return numbers ^ _shift(numbers, 31)


def _shift(numbers: Tensor, count: int) -> Tensor:
    """Return numbers shifted to the right, zeros coming in: torch's own shift repeats the sign."""
    shifted: Tensor = (numbers >> count) & (2 ** (64 - count) - 1)
    return shifted
