"""Digests of tensors by content: one read, in place, on the device where they are.

A tensor's bits are taken for integers and summed with weights that depend on their place, modulo ``2**64``:
what changes, moves or trades places changes the sum. Zeros at the end do not, and neither does padding with
them. It is made for noticing changes, not for withstanding someone who wants it to fail.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

from lightning_influence.support.random_states import hash_numbers
from lightning_influence.support.whole import read_whole

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Numbers of a row that share their weights with those so much further on, up to a factor for the whole run.
_RUN = 2**14
# Chosen by hand: numbers that are converted at once, 8 MiB.
_AT_ONCE = 2**20


def digest_rows(rows: Tensor) -> Tensor:
    """Return a digest of each row of a tensor.

    Args:
        rows: ``(B, ...)``, of any dtype and device; not sparse.

    Returns:
        ``(B,)`` int64, on the same device.
    """
    numbers = _as_integers(rows)
    total = torch.zeros(len(numbers), dtype=torch.int64, device=rows.device)
    weights, factors = _weights(rows.device)
    for number, start in enumerate(range(0, numbers.shape[1], _RUN)):
        run = numbers[:, start : start + _RUN]
        count = max(1, _AT_ONCE // run.shape[1])
        for first in range(0, len(run), count):
            part = run[first : first + count].to(torch.int64)
            sums = (part * weights[: run.shape[1]]).sum(dim=1)
            total[first : first + count] += sums * factors[number % _RUN] * (2 * (number // _RUN) + 1)
    return total


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """Return a short text that changes with the names, shapes, precisions and contents of tensors."""
    facts = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    found = [digest_rows(read_whole(tensor).detach()[None]) for tensor in tensors.values() if tensor.numel()]
    devices = sorted({str(digest.device) for digest in found})
    # One wait for each device.
    values = [
        torch.cat([digest for digest in found if str(digest.device) == device]).tolist() for device in devices
    ]
    return digest_text(repr((facts, values)))


def digest_text(text: str) -> str:
    """Return a short text that changes with another one."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest_number(value: object) -> int:
    """Return a 64-bit integer that changes with what a plain value prints as."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big", signed=True)


def _as_integers(rows: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, ``(B, numbers of a row)``."""
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    flat = rows.detach().reshape(len(rows), -1)
    return flat.view(_INTEGERS[flat.element_size()])


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return odd numbers: by place in a run, and by run."""
    drawn = hash_numbers(torch.tensor([1, 2], device=device), _RUN) | 1
    return drawn[0], drawn[1]
