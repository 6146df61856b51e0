"""Traces of a symmetric matrix that is known by its products: Hutchinson and Hutch++."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Estimate, Product, orthonormal_rows, random_vectors


@dataclass(frozen=True)
class Traces:
    """``Tr(H)`` and ``Tr(H^2)``.

    Attributes:
        trace: ``Tr(H)``, with (a bound on) its standard error.
        square: ``Tr(H^2)``, the squared Frobenius norm, likewise.
    """

    trace: Estimate
    square: Estimate


def hutchinson(product: Product, probes: Tensor) -> Traces:
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


def hutch_pp(
    product: Product,
    numel: int,
    products: int,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Traces:
    """Hutch++ (Meyer, Musco, Musco and Woodruff 2021): exact on a sketched range, Hutchinson on the rest.

    Of ``m`` products a third each finds the range, measures it, and probes what is left. For a positive
    matrix the relative error falls as ``1 / m`` where Hutchinson's falls as ``1 / sqrt(m)``.

    Args:
        product: ``H``.
        numel: ``P``.
        products: ``m``, at least 6.
        seed: of the random vectors.
        dtype: precision of the vectors.
        device: where they are.

    Returns:
        Unbiased estimates with bounds on their standard errors, from three calls of the product.

    Raises:
        ValueError: if there are fewer than 6 products.
    """
    if products < 6:
        raise ValueError(f"Got products={products}; accepted are numbers of at least 6 (three thirds).")
    third = products // 3
    sketch = product(random_vectors(min(third, numel), numel, seed, dtype=dtype, device=device))
    tolerance = torch.finfo(sketch.dtype).eps * float(sketch.norm()) * numel**0.5
    basis, _ = orthonormal_rows(sketch, tolerance)
    if not len(basis):
        return Traces(Estimate(0.0, 0.0), Estimate(0.0, 0.0))
    pushed = product(basis).double()
    inside = Traces(
        Estimate(float((basis.double() * pushed).sum()), 0.0), Estimate(float(pushed.square().sum()), 0.0)
    )
    if len(basis) == numel:
        return inside
    probes = random_vectors(products - 2 * third, numel, seed + 1, dtype=dtype, device=device)
    return deflated(product, basis, inside, probes)


def deflated(product: Product, basis: Tensor, inside: Traces, probes: Tensor) -> Traces:
    """Add the trace on a subspace, which is known, to Hutchinson's estimate on its complement.

    Args:
        product: ``H``.
        basis: orthonormal rows ``(r, P)``, independent of the probes.
        inside: ``Tr(Q H Q^T)`` and ``Tr(Q H^2 Q^T)`` for the rows ``Q``.
        probes: ``(V, P)``, independent with ``E[z z^T] = I``.

    Returns:
        Unbiased estimates for the whole space, from one call of the product.
    """
    outside = hutchinson(product, probes - (probes @ basis.T) @ basis)
    return Traces(_sum(inside.trace, outside.trace), _sum(inside.square, outside.square))


def _sum(known: Estimate, estimated: Estimate) -> Estimate:
    return Estimate(known.value + estimated.value, estimated.error)
