"""Preconditioned block Krylov: all queries of a group share one subspace (O'Leary 1980, in Galerkin form)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""Maps vectors ``(V, P)`` to their products ``(V, P)`` with a symmetric matrix."""


@dataclass(frozen=True)
class KrylovResult:
    """Solutions and how good they are.

    Attributes:
        solutions: ``X``, ``(V, P)``.
        residuals: ``||v - A x|| / ||v||`` of each right-hand side, ``(V,)``.
        steps: number of products with ``A`` (each on all directions of a step at once).
    """

    solutions: Tensor
    residuals: Tensor
    steps: int


def block_krylov(
    product: Product,
    precondition: Product,
    vectors: Tensor,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    max_steps: int = 8,
    tolerance: float = 1e-6,
) -> KrylovResult:
    """Solve ``A X = V`` in the subspace that all right-hand sides span together.

    Step ``k`` adds the preconditioned residuals (at first the preconditioned right-hand sides) to the
    subspace and projects. In exact arithmetic ``P / V`` steps solve exactly. Right-hand sides below the
    tolerance add nothing further.

    Args:
        product: ``A`` (with its damping), positive definite.
        precondition: ``P^{-1}``.
        vectors: ``V``, ``(V, P)``.
        start: an orthonormal subspace ``(m, P)`` and its products ``(m, P)``, such as a coarse space.
        max_steps: largest number of steps.
        tolerance: relative residual at which a right-hand side counts as solved.

    Returns:
        The solutions with their residuals.
    """
    norms = vectors.norm(dim=1).clamp_min(torch.finfo(vectors.dtype).tiny)
    basis, products = (vectors[:0], vectors[:0]) if start is None else start
    coordinates = _project(basis, products, vectors)
    remainder = vectors - coordinates @ products
    open_ = remainder.norm(dim=1) / norms > tolerance
    directions, steps = vectors, 0
    while steps < max_steps and bool(open_.any()):
        fresh = _orthonormal(precondition(directions[open_]), basis)
        if not len(fresh) and directions is vectors and len(basis):  # all in the start already
            fresh = _orthonormal(precondition(remainder[open_]), basis)
        if not len(fresh):
            break
        basis = torch.cat([basis, fresh])
        products = torch.cat([products, product(fresh)])
        steps += 1
        coordinates = _project(basis, products, vectors)
        directions = remainder = vectors - coordinates @ products
        open_ = remainder.norm(dim=1) / norms > tolerance
    return KrylovResult(coordinates @ basis, remainder.norm(dim=1) / norms, steps)


def _project(basis: Tensor, products: Tensor, vectors: Tensor) -> Tensor:
    """Return Galerkin coordinates ``(V, k)``, in float64."""
    small = basis.double() @ products.double().T
    right = basis.double() @ vectors.double().T
    coordinates: Tensor = torch.linalg.solve((small + small.T) / 2, right)
    return coordinates.T.to(vectors.dtype)


def _orthonormal(directions: Tensor, basis: Tensor) -> Tensor:
    """Return the part of ``directions`` that is numerically outside ``basis``, orthonormal."""
    scale = directions.norm(dim=1, keepdim=True)
    directions = directions / scale.clamp_min(torch.finfo(directions.dtype).tiny)
    for _ in range(2):  # once more: a single projection leaves rounding errors of the size of what it removed
        directions = directions - (directions @ basis.T) @ basis
    gram = (directions @ directions.T).double()
    values, vectors = torch.linalg.eigh(gram)
    keep = values > 1e4 * torch.finfo(directions.dtype).eps
    fresh = (vectors[:, keep] / values[keep].sqrt()).T.to(directions.dtype) @ directions
    fresh = fresh - (fresh @ basis.T) @ basis
    orthonormal: Tensor = torch.linalg.qr(fresh.T).Q.T.contiguous() if len(fresh) else fresh
    return orthonormal
