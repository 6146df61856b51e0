"""Inner products of long vectors, summed in float64 without a float64 copy of the vectors."""

from __future__ import annotations

from torch import Tensor, float64

# Columns that are converted at once.
_COLUMNS = 2**15


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right.T`` in float64, for vectors ``(V, P)`` and ``(W, P)`` in rows."""
    result = left.new_zeros(len(left), len(right), dtype=float64)
    for start in range(0, left.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        result += left[:, columns].double() @ right[:, columns].double().T
    return result
