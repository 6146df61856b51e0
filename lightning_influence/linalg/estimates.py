"""Numbers with their errors: random vectors, and traces that are estimated with them.

The matrix is known by its products.
"""

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


@dataclass(frozen=True)
class Traces:
    """``Tr(H)`` and ``Tr(H^2)``.

    Attributes:
        trace: ``Tr(H)``, with (a bound on) its standard error.
        square: ``Tr(H^2)``, the squared Frobenius norm, likewise.
    """

    trace: Estimate
    square: Estimate


def average(samples: Tensor) -> Estimate:
    """Average independent samples.

    Args:
        samples: ``(S,)``.

    Returns:
        The mean with its standard error, which is infinite for a single sample.
    """
    values = samples.double()
    count = len(values)
    error = float(values.std() / math.sqrt(count)) if count > 1 else math.inf
    return Estimate(float(values.mean()), error)


def divide(above: Estimate, below: Estimate) -> Estimate:
    """Divide one estimate by another.

    Args:
        above: the numerator.
        below: the denominator.

    Returns:
        The quotient. Relative errors are added, because the two may depend on each other.
    """
    if below.value == 0:
        return Estimate(math.nan, None)
    value = above.value / below.value
    if above.error is None or below.error is None:
        return Estimate(value, None)
    return Estimate(value, (above.error + abs(value) * below.error) / abs(below.value))


def draw_vectors(
    count: int,
    numel: int,
    seed: int,
    *,
    kind: Literal["signs", "normal"] = "signs",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw independent vectors with ``E[z z^T] = I``, the same on every device and process.

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


def estimate_traces(product: Product, probes: Tensor) -> Traces:
    """Average ``z^T H z`` and ``||H z||^2`` over random vectors (Hutchinson 1990).

    The variance of ``z^T H z`` is at most ``2 ||H||_F^2`` and that of ``||H z||^2`` at most
    ``2 ||H^2||_F^2``, which is at most ``2 Tr(H^2)^2``, for normal ``z`` and less for signs. The errors are
    these bounds with the estimate of ``Tr(H^2)`` put in: the samples' own spread says little while they are
    few.

    Args:
        product: ``H``.
        probes: ``z``, ``(V, P)``, independent with ``E[z z^T] = I``.

    Returns:
        Unbiased estimates with bounds on their standard errors, from one call of the product.
    """
    products = product(probes).double()
    square = float(products.square().sum(1).mean())
    trace = float((probes.double() * products).sum(1).mean())
    share = math.sqrt(2 / len(probes))
    return Traces(Estimate(trace, share * math.sqrt(square)), Estimate(square, share * square))


def add_traces_outside(product: Product, basis: Tensor, inside: Traces, probes: Tensor) -> Traces:
    """Add Hutchinson's estimate on the complement of a subspace to the traces on it, which are known.

    This is the second half of Hutch++ (Meyer, Musco, Musco and Woodruff 2021): where the subspace holds the
    leading eigenvectors, little is left to estimate.

    Args:
        product: ``H``.
        basis: orthonormal rows ``(r, P)``, independent of the probes.
        inside: ``Tr(Q H Q^T)`` and ``Tr(Q H^2 Q^T)`` for the rows ``Q``.
        probes: ``(V, P)``, independent with ``E[z z^T] = I``.

    Returns:
        Unbiased estimates for the whole space, from one call of the product.
    """
    outside = estimate_traces(product, probes - (probes @ basis.T) @ basis)
    return Traces(_sum(inside.trace, outside.trace), _sum(inside.square, outside.square))


def _sum(known: Estimate, estimated: Estimate) -> Estimate:
    return Estimate(known.value + estimated.value, estimated.error)
