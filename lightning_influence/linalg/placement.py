"""Eigendecompositions of matrices on an accelerator: there, or on the CPU beside it, as it turns out.

Which is faster depends on both, on the width and on the precision: consumer GPUs are slow in double
precision, some accelerators cannot decompose at all, and a CPU has few cores or many. So both are tried, once
for each class of widths, on a block of the first matrix of its class.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

# Blocks of at most this width are tried: a second or less where either is slow. Chosen by hand.
_TRIED = 1024
# Times that the CPU must be faster: a choice that noise can turn would not answer the same way twice.
_CLEARLY = 2.0
#: Whether the CPU decomposes, by type of device, precision, and class of widths.
_on_cpu: dict[tuple[str, torch.dtype, int], bool] = {}


def decompose_symmetric(symmetric: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, found where that is faster.

    Args:
        symmetric: ``(..., D, D)``.
        dtype: precision of the decomposition.

    Returns:
        ``(..., D)``, ascending, and ``(..., D, D)``, in columns, on the device of the matrices. In precision
        ``dtype``, or that of the matrices where the CPU has decomposed those of a device.

    Raises:
        RuntimeError: if it does not converge.
    """
    if not _is_cpu(symmetric) and _belongs_on_cpu(symmetric, dtype):
        return _decompose_on_cpu(symmetric, dtype)
    return _decompose_in_place(symmetric, dtype)


def _is_cpu(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu"


def _decompose_in_place(symmetric: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(symmetric.to(dtype))
    return values, vectors


def _decompose_on_cpu(symmetric: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(symmetric.cpu().to(dtype))
    return values.to(symmetric), vectors.to(symmetric)


def _belongs_on_cpu(symmetric: Tensor, dtype: torch.dtype) -> bool:
    width = min(symmetric.shape[-1], _TRIED)
    key = (symmetric.device.type, dtype, math.ceil(math.log2(max(width, 1))))
    if key not in _on_cpu:
        block = symmetric[..., :width, :width]
        try:
            there = _time(_decompose_in_place, block, dtype)
        except (NotImplementedError, TypeError):  # no decompositions there, or no such precision
            _on_cpu[key] = True
        else:
            _on_cpu[key] = _CLEARLY * _time(_decompose_on_cpu, block, dtype) < there
    return _on_cpu[key]


def _time(
    work: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]], block: Tensor, dtype: torch.dtype
) -> float:
    """Return the seconds of a decomposition, the second of two: the first one loads libraries."""
    for _ in range(2):
        started = time.perf_counter()
        float(work(block, dtype)[1].sum())  # a number that is read is one that is waited for
    return time.perf_counter() - started
