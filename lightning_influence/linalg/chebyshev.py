"""Chebyshev iteration: what a fixed-step iteration becomes when its step may change from product to product.

Golub and Varga (1961). With the spectrum of ``A`` in a known interval, the error after ``T`` steps is at most
``2 q^T`` of the first, ``q = (sqrt(c) - 1) / (sqrt(c) + 1)`` for the interval's ratio ``c``, where a constant
step needs ``c`` times ``log`` of the accuracy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.stopping import Progress, Solution, bound_errors, compute_remainder
from lightning_influence.support.errors import DivergenceError

# Exact arithmetic keeps the residual at most twice the first one; this leaves room for rounding.
_GROWTH = 4.0


def count_chebyshev_steps(smallest: float, largest: float, tolerance: float) -> int:
    """Return after how many steps the relative error is at most the tolerance for any right-hand side.

    Args:
        smallest: positive lower bound of the eigenvalues.
        largest: their upper bound.
        tolerance: largest relative error, in (0, 1).
    """
    root = math.sqrt(largest / smallest)
    if root <= 1.0:
        return 1
    return max(1, math.ceil(math.log(2.0 / tolerance) / math.log((root + 1.0) / (root - 1.0))))


def chebyshev(
    product: Product,
    vectors: Tensor,
    *,
    smallest: float,
    largest: float,
    guess: Tensor | None = None,
    max_steps: int = 100,
    enough_steps: int | None = None,
    tolerance: float = 0.05,
) -> Solution:
    """Solve ``A X = V`` by a polynomial that is small on an interval.

    Args:
        product: ``A``, whose eigenvalues lie in the interval.
        vectors: ``V``, ``(V, P)``.
        smallest: lower end of the interval, positive.
        largest: its upper end.
        guess: where to begin, ``(V, P)``; costs a product.
        max_steps: most steps.
        enough_steps: the number of steps from which on the interval alone bounds the relative error, as
            :func:`count_chebyshev_steps` gives it; never if None.
        tolerance: a right-hand side is done when its relative residual is at most this, and the bound on its
            relative error too or there were enough steps.

    Returns:
        The solutions with their residuals; ``facts["error_bound"]`` is the largest bound on a relative error.

    Raises:
        DivergenceError: if residuals grow: an eigenvalue lies above the interval.
    """
    progress = Progress(vectors, tolerance)
    solutions = torch.zeros_like(vectors) if guess is None else guess.clone()
    remainder = vectors.clone() if guess is None else vectors - product(solutions)
    products = 0 if guess is None else 1
    progress.observe(remainder)
    limit = _GROWTH * max(1.0, progress.history[-1] if progress.history else 1.0)
    middle, half = (largest + smallest) / 2, max((largest - smallest) / 2, 1e-12 * largest)
    # Also those within the tolerance, because their error may not be.
    rows = (progress.residuals > 0).nonzero().flatten()
    direction, ratio, steps = remainder[rows] / middle, half / middle, 0
    while len(rows) and steps < max_steps:
        image = product(direction)
        solutions[rows] += direction
        remainder[rows] -= image
        steps += 1
        open_ = progress.observe(remainder[rows], rows)
        _check_growth(progress, limit, largest, direction, image)
        if enough_steps is None or steps < enough_steps:
            open_ |= bound_errors(remainder[rows], solutions[rows], smallest) > tolerance
        rows, direction = rows[open_], direction[open_]
        following = 1.0 / (2.0 * middle / half - ratio)
        direction = following * ratio * direction + (2.0 * following / half) * remainder[rows]
        ratio = following
    if steps:  # the recursion would go on falling below what the precision allows
        remainder = compute_remainder(product, vectors, solutions)
        products += 1
        progress.observe(remainder)
    bounds = bound_errors(remainder, solutions, smallest)
    facts = {"error_bound": float(bounds.max()) if len(bounds) else 0.0}
    return Solution(solutions, progress.residuals, steps, products + steps, progress.history, facts)


def _check_growth(progress: Progress, limit: float, largest: float, direction: Tensor, image: Tensor) -> None:
    """Refuse to go on when residuals have grown.

    Raises:
        DivergenceError: naming the eigenvalue that was found above the interval.
    """
    if progress.history[-1] <= limit:
        return
    quotient = (direction * image).sum(dim=1) / direction.square().sum(dim=1)
    raise DivergenceError(
        f"The iteration diverged: the residual grew to {progress.history[-1]:.3g} of the right-hand side. "
        f"Its steps are too large: they assume eigenvalues up to {largest:.4g}, and directions of curvature "
        f"{float(quotient.max()):.4g} were met. Give the spectrum more passes, or use method='cg'."
    )
