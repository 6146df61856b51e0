"""Conjugate gradients, plain and preconditioned, for many right-hand sides at once.

Hestenes and Stiefel (1952). Every right-hand side has its own coefficients; they only share the products,
each of which is one pass over the data whatever the number of vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.stopping import Progress, Solution, run_sweeps
from lightning_influence.support.errors import IndefiniteError


class ConjugateDirections:
    """The recursion of Hestenes and Stiefel (1952), for the right-hand sides that are open, ``(k, P)``.

    Args:
        remainder: their residuals at the start.
        precondition: ``P^{-1}``, symmetric positive definite; the identity if None.

    Attributes:
        remainder: their residuals now, by the recursion.

    Raises:
        IndefiniteError: if the preconditioner is not positive.
    """

    def __init__(self, remainder: Tensor, precondition: Product | None = None) -> None:
        self.remainder = remainder
        self._precondition = precondition
        self._direction = self._correct()
        self._energy = self._measure(self._direction)
        self._size = 0.0

    def advance(self, product: Product) -> tuple[Tensor, Tensor]:
        """Go to the minimum along the current directions, with one product.

        Returns:
            The change of the solutions, ``(k, P)``, and the curvature ``p^T A p`` of each direction,
            ``(k,)``: zero where it is rounding for a matrix of this size. There the change is zero.
        """
        direction = self._direction
        image = product(direction)
        square = direction.square().sum(dim=1)
        self._size = max([self._size, *(image.norm(dim=1) / square.sqrt()).tolist()])
        curvature = _dot(direction, image)
        # A sum of products is this far off; eight is chosen by hand, for the summation over a long vector.
        rounding = 8 * torch.finfo(direction.dtype).eps * self._size * square
        curvature = torch.where(curvature.abs() > rounding, curvature, torch.zeros_like(curvature))
        length = torch.where(curvature > 0, self._energy / curvature, torch.zeros_like(curvature))[:, None]
        self.remainder = self.remainder - length * image
        return length * direction, curvature

    def turn(self, kept: Tensor) -> None:
        """Let go of right-hand sides, and find the next conjugate directions of the others.

        Args:
            kept: which stay, boolean, ``(k,)``.

        Raises:
            IndefiniteError: if the preconditioner is not positive.
        """
        self.remainder, direction, previous = self.remainder[kept], self._direction[kept], self._energy[kept]
        corrected = self._correct()
        self._energy = self._measure(corrected)
        self._direction = corrected + (self._energy / previous)[:, None] * direction

    def _correct(self) -> Tensor:
        return self.remainder if self._precondition is None else self._precondition(self.remainder)

    def _measure(self, corrected: Tensor) -> Tensor:
        """Return ``r^T P^{-1} r``, ``(k,)``.

        Raises:
            IndefiniteError: if one is negative.
        """
        energy = _dot(self.remainder, corrected)
        if bool((energy < 0).any()):
            raise IndefiniteError(
                f"The preconditioner gives {int((energy < 0).sum())} of {len(energy)} residuals a negative "
                "norm; it has to be symmetric positive definite. Refit the factors, or raise the damping."
            )
        return energy

    def refuse_negative(self, curvature: Tensor) -> None:
        """Refuse a matrix that is not positive semidefinite.

        Args:
            curvature: from :meth:`advance`, before the next :meth:`turn`.

        Raises:
            IndefiniteError: if there is negative curvature.
        """
        if bool((curvature < 0).any()):
            worst = float((curvature / self._direction.square().sum(dim=1)).min())
            raise IndefiniteError(
                f"Conjugate gradients met negative curvature: p^T A p / p^T p = {worst:.3g} for "
                f"{int((curvature < 0).sum())} of {len(curvature)} right-hand sides. The damped matrix is "
                f"not positive definite; raise the damping by more than {-worst:.3g}, use method='minres', "
                "which needs no definiteness, or the Gauss-Newton matrix (curvature='ggn')."
            )


def conjugate_gradients(
    product: Product,
    vectors: Tensor,
    *,
    precondition: Product | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-3,
) -> Solution:
    """Solve ``A X = V`` for a symmetric positive definite ``A``.

    Args:
        product: ``A`` (with its damping).
        vectors: ``V``, ``(V, P)``.
        precondition: ``P^{-1}``, symmetric positive definite.
        max_steps: most steps.
        tolerance: relative residual at which a right-hand side is solved and leaves the iteration.

    Returns:
        The solutions with their true residuals.

    Raises:
        IndefiniteError: if a direction of negative curvature is met, or the preconditioner is not positive.
    """

    def sweep(progress: Progress, solutions: Tensor, remainder: Tensor, rows: Tensor, limit: int) -> int:
        recursion, steps = ConjugateDirections(remainder, precondition), 0
        while len(rows) and steps < limit:
            change, curvature = recursion.advance(product)
            recursion.refuse_negative(curvature)
            solutions[rows] += change
            steps += 1
            kept = progress.observe(recursion.remainder, rows) & (curvature > 0)
            # Turning costs a preconditioning, which only those that go on are worth.
            rows = rows[kept]
            recursion.turn(kept)
        return steps

    return run_sweeps(product, vectors, sweep, max_steps=max_steps, tolerance=tolerance)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(dim=1)
