"""Numbers with their errors, and the random vectors that they are estimated with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: ``V (V, P) -> H V (V, P)`` for a symmetric ``H``.
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A number and how far off it may be.

    Attributes:
        value: the number.
        error: its standard error over random vectors or examples, or a bound where the function says so;
            None if it is not known.
    """

    value: float
    error: float | None

    def __str__(self) -> str:
        """Return the number with its error, as ``1.23 +- 0.04``."""
        return f"{self.value:.4g}" if self.error is None else f"{self.value:.4g} +- {self.error:.2g}"


def mean_of(samples: Tensor) -> Estimate:
    """Return the mean of independent samples ``(S,)`` with its standard error; infinite for a single one."""
    values = samples.double()
    count = len(values)
    error = float(values.std() / math.sqrt(count)) if count > 1 else math.inf
    return Estimate(float(values.mean()), error)


def ratio_of(above: Estimate, below: Estimate) -> Estimate:
    """Return the quotient of two estimates, their relative errors added (they may depend on each other)."""
    if below.value == 0:
        return Estimate(math.nan, None)
    value = above.value / below.value
    if above.error is None or below.error is None:
        return Estimate(value, None)
    return Estimate(value, (above.error + abs(value) * below.error) / abs(below.value))


def random_vectors(
    count: int,
    numel: int,
    seed: int,
    *,
    kind: Literal["signs", "normal"] = "signs",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Independent random vectors with ``E[z z^T] = I``, the same on every device and process.

    Args:
        count: ``V``.
        numel: ``P``.
        seed: chooses them.
        kind: entries ``-1`` and ``1`` (least variance for traces; Hutchinson 1990), or standard normal.
        dtype: precision of the result.
        device: where the result is.

    Returns:
        ``(V, P)``.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal":
        vectors = torch.randn(count, numel, generator=generator)
    else:
        vectors = 2.0 * torch.randint(2, (count, numel), generator=generator) - 1.0
    return vectors.to(device, dtype)


def orthonormal_rows(vectors: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of the rows, and the rows in it.

    Args:
        vectors: ``(V, P)``.
        tolerance: directions with singular values up to this are left out.

    Returns:
        ``Q (r, P)`` and ``C (V, r)`` with ``vectors = C Q`` up to what was left out.
    """
    left, sizes, right = torch.linalg.svd(vectors, full_matrices=False)
    kept = sizes > tolerance
    return right[kept], (left * sizes)[:, kept]
