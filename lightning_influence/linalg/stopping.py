"""One stopping rule and one set of results for all iterative solvers.

A right-hand side ``v`` counts as solved when its own *relative residual* ``||v - A x|| / ||v||`` is at most
the tolerance. It then leaves the iteration, so that an answer does not depend on its neighbours. What a
solver returns is judged by a product with the answer itself at the end (:func:`compute_remainder`), in
float64, never by a recursion, which in float32 goes on falling after the true residual has stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Product
from lightning_influence.support.errors import DivergenceError

# The residual of conjugate gradients may rise on the way, but not by this much on a system that it can solve.
# Chosen by hand.
_FAR = 10.0


@dataclass(frozen=True)
class Solution:
    """Solutions, how good they are and what they took.

    Attributes:
        solutions: ``X``, ``(V, P)``.
        residuals: ``||v - A x|| / ||v||`` of each right-hand side, ``(V,)``; 0 for a zero right-hand side.
            They belong to the solutions as they are, rounded to their precision, and were summed in float64.
        steps: number of steps of the right-hand side that took most.
        products: products with the full-data ``A``, each on several vectors at once.
        history: the largest relative residual before the first step, after each, and of the products that
            verify it.
        facts: what else the solver decided or found, as JSON values.
    """

    solutions: Tensor
    residuals: Tensor
    steps: int
    products: int = 0
    history: list[float] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Progress:
    """Watches the residual of every right-hand side, and says which are still open.

    Args:
        vectors: the right-hand sides ``(V, P)``.
        tolerance: largest relative residual of a solved one.

    Attributes:
        residuals: the latest relative residual of each, ``(V,)``.
        history: the largest of them, observation by observation.
    """

    def __init__(self, vectors: Tensor, tolerance: float) -> None:
        self.tolerance = tolerance
        self.norms = vectors.norm(dim=1)
        self.residuals = (self.norms > 0).to(vectors.dtype)
        self.history: list[float] = []

    def observe(self, remainder: Tensor, rows: Tensor | None = None) -> Tensor:
        """Take the residual vectors ``(k, P)`` of some right-hand sides.

        Args:
            remainder: ``v - A x``.
            rows: which right-hand sides they belong to, ``(k,)``; all if None.

        Returns:
            Whether each of them is still open, ``(k,)``.

        Raises:
            DivergenceError: if a residual is NaN or infinite.
        """
        norms = self.norms if rows is None else self.norms[rows]
        relative = remainder.norm(dim=1).to(norms.dtype) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        if not bool(torch.isfinite(relative).all()):
            raise DivergenceError(
                f"The residual of {int((~torch.isfinite(relative)).sum())} right-hand sides is not finite. "
                "Check the queries, the training data and the weights for NaN or infinity; raise the damping."
            )
        if rows is None:
            self.residuals = relative
        else:
            self.residuals[rows] = relative
        self.history.append(float(self.residuals.max()) if len(self.residuals) else 0.0)
        still_open: Tensor = relative > self.tolerance
        return still_open


def compute_remainder(product: Product, vectors: Tensor, solutions: Tensor) -> Tensor:
    """Compute ``v - A x`` in float64, which is the precision that a residual has to be known in.

    In float32, the product's own rounding is as large as the residual of what is solved to that precision.
    The price beside that of a product is twice the memory of the vectors while it runs, and the arithmetic
    of float64 for what the product computes in the precision of its vectors.

    Args:
        product: ``A``; is given float64 vectors.
        vectors: ``v``, ``(V, P)``.
        solutions: ``x``, ``(V, P)``.

    Returns:
        ``(V, P)``, float64.
    """
    return vectors - product(solutions.double()).double()


def bound_errors(remainder: Tensor, solutions: Tensor, smallest: float) -> Tensor:
    """Bound the relative error of solutions when the smallest eigenvalue of ``A`` is known from below.

    From ``x - x* = -A^{-1} r`` follows ``||x - x*|| <= ||r|| / smallest``, and so, with ``rho = ||r|| /
    (smallest ||x||) < 1``, ``||x - x*|| / ||x*|| <= rho / (1 - rho)``. With a positive semidefinite curvature
    the damping is such a bound.

    Args:
        remainder: ``r = v - A x``, ``(V, P)``.
        solutions: ``x``, ``(V, P)``.
        smallest: a positive lower bound of the eigenvalues of ``A``.

    Returns:
        The bound for each, ``(V,)``; infinite where the residual says nothing, 0 where it is zero.
    """
    lost = remainder.norm(dim=1)
    known = smallest * solutions.norm(dim=1)
    bound = torch.where(known > lost, lost / (known - lost), torch.full_like(lost, float("inf")))
    return torch.where(lost == 0, torch.zeros_like(bound), bound)


Sweep = Callable[[Progress, Tensor, Tensor, Tensor, int], int]
"""Takes steps of a recursion; see :func:`run_sweeps`."""


def run_sweeps(
    product: Product,
    vectors: Tensor,
    sweep: Sweep,
    *,
    max_steps: int,
    tolerance: float,
) -> Solution:
    """Run sweeps of a short recursion until the true residual agrees with what the recursion claims.

    Args:
        product: ``A``.
        vectors: the right-hand sides ``(V, P)``.
        sweep: takes the progress to report to, the solutions ``(V, P)``, changed in place, the residuals
            ``(k, P)`` of the open ones, their positions ``(k,)`` and how many steps are left; returns the
            number of steps it took.
        max_steps: most steps in all.
        tolerance: of the relative residual.

    Returns:
        The solutions with their true residuals.

    Raises:
        DivergenceError: if a residual is not finite, or far larger than that of the zero vector.
    """
    progress = Progress(vectors, tolerance)
    solutions, remainder = torch.zeros_like(vectors), vectors.clone()
    rows = progress.observe(remainder).nonzero().flatten()
    steps, products, sweeps = 0, 0, 0
    while len(rows) and steps < max_steps:
        before = progress.residuals[rows]
        earlier = solutions[rows], remainder[rows]
        taken = sweep(progress, solutions, remainder[rows], rows, max_steps - steps)
        reached = compute_remainder(product, vectors[rows], solutions[rows])
        remainder[rows] = reached.to(remainder.dtype)
        steps, products, sweeps = steps + taken, products + taken + 1, sweeps + 1
        still = progress.observe(reached, rows)
        after = progress.residuals[rows]
        if sweeps > 1 and bool((after > before).any()):  # a restart that only added rounding
            worse = after > before
            solutions[rows[worse]], remainder[rows[worse]] = earlier[0][worse], earlier[1][worse]
            progress.residuals[rows[worse]] = before[worse]
            progress.history.append(float(progress.residuals.max()))
        # A sweep that gains less than a half is at the limit of the precision, or of its steps.
        rows = rows[still & (after < 0.5 * before)]
    if len(vectors) and float(progress.residuals.max()) > _FAR:
        raise DivergenceError(
            f"The iteration moved away from the solution: after {steps} steps the residual is "
            f"{float(progress.residuals.max()):.3g} times the right-hand side. The damped matrix is "
            "singular, or too close to it for this precision and number of steps. Raise the damping, or "
            "max_steps."
        )
    return Solution(
        solutions, progress.residuals, steps, products, progress.history, {"restarts": max(sweeps - 1, 0)}
    )
