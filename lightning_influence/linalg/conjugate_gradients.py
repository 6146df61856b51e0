"""Conjugate gradients, plain and preconditioned, for many right-hand sides at once.

Hestenes and Stiefel (1952). Every right-hand side has its own coefficients; they only share the products,
each of which is one pass over the data whatever the number of vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.stopping import Progress, Solution, verified
from lightning_influence.support.errors import IndefiniteError


def conjugate_gradients(
    product: Product,
    vectors: Tensor,
    *,
    precondition: Product | None = None,
    guess: Tensor | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-3,
) -> Solution:
    """Solve ``A X = V`` for a symmetric positive definite ``A``.

    Args:
        product: ``A`` (with its damping).
        vectors: ``V``, ``(V, P)``.
        precondition: ``P^{-1}``, symmetric positive definite.
        guess: where to begin, ``(V, P)``; costs a product.
        max_steps: most steps.
        tolerance: relative residual at which a right-hand side is solved and leaves the iteration.

    Returns:
        The solutions with their true residuals.

    Raises:
        IndefiniteError: if a direction of negative curvature is met, or the preconditioner is not positive.
    """

    def sweep(progress: Progress, solutions: Tensor, remainder: Tensor, rows: Tensor, limit: int) -> int:
        direction = remainder if precondition is None else precondition(remainder)
        energy = _positive(_dot(remainder, direction))
        steps, size = 0, 0.0
        while len(rows) and steps < limit:
            image = product(direction)
            size = max(size, float((image.norm(dim=1) / direction.norm(dim=1)).max()))
            curvature = _curvature(direction, image, size)
            length = torch.where(curvature > 0, energy / curvature, torch.zeros_like(energy))[:, None]
            solutions[rows] += length * direction
            remainder = remainder - length * image
            steps += 1
            kept = progress.observe(remainder, rows) & (curvature > 0)
            rows, remainder, direction, energy = rows[kept], remainder[kept], direction[kept], energy[kept]
            corrected = remainder if precondition is None else precondition(remainder)
            previous, energy = energy, _positive(_dot(remainder, corrected))
            direction = corrected + (energy / previous)[:, None] * direction
        return steps

    return verified(product, vectors, guess, sweep, max_steps=max_steps, tolerance=tolerance)


def _curvature(direction: Tensor, image: Tensor, size: float) -> Tensor:
    """Compute ``p^T A p``, zero where it is rounding for a matrix of this size.

    Returns:
        The curvature of each direction, ``(k,)``.

    Raises:
        IndefiniteError: if it is negative beyond rounding.
    """
    curvature = _dot(direction, image)
    rounding = 8 * torch.finfo(direction.dtype).eps * size * direction.square().sum(dim=1)
    if bool((curvature < -rounding).any()):
        quotients = curvature / direction.square().sum(dim=1)
        worst = float(quotients.min())
        raise IndefiniteError(
            f"Conjugate gradients met negative curvature: p^T A p / p^T p = {worst:.3g} for "
            f"{int((curvature < -rounding).sum())} of {len(curvature)} right-hand sides. The damped matrix "
            f"is not positive definite; raise the damping by more than {-worst:.3g}, use method='minres', "
            "which needs no definiteness, or the Gauss-Newton matrix (curvature='ggn')."
        )
    return torch.where(curvature > rounding, curvature, torch.zeros_like(curvature))


def _positive(energy: Tensor) -> Tensor:
    """Return ``r^T P^{-1} r``.

    Raises:
        IndefiniteError: if it is negative.
    """
    if bool((energy < 0).any()):
        raise IndefiniteError(
            f"The preconditioner gives {int((energy < 0).sum())} of {len(energy)} residuals a negative norm; "
            "it has to be symmetric positive definite. Refit the factors, or raise the damping."
        )
    return energy


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(dim=1)
