"""MINRES (Paige and Saunders 1975), plain and preconditioned, for symmetric matrices of any sign.

A Hessian away from a minimum has negative eigenvalues; conjugate gradients may then break down, the minimal
residual does not. The preconditioner has to be positive definite: an EK-FAC or Gauss-Newton inverse is one
for a Hessian. What falls from step to step is the residual's norm under the preconditioner, the plain norm
without one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.stopping import Progress, Solution, verified
from lightning_influence.support.errors import IndefiniteError

# A step whose cosine is smaller lowers the residual by less than a twenty-thousandth.
_LITTLE = 0.01


def minres(
    product: Product,
    vectors: Tensor,
    *,
    precondition: Product | None = None,
    guess: Tensor | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-3,
) -> Solution:
    """Solve ``A X = V`` for a symmetric ``A`` that may be indefinite.

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
        IndefiniteError: if the preconditioner is not positive definite.
    """

    def sweep(progress: Progress, solutions: Tensor, remainder: Tensor, rows: Tensor, limit: int) -> int:
        steps = 0
        state = _State.begin(remainder, precondition)
        while len(rows) and steps < limit:
            change = state.step(product, precondition)
            solutions[rows] += change
            steps += 1
            kept = progress.observe(state.remainder, rows) & state.alive
            rows = rows[kept]
            state.keep(kept)
        return steps

    return verified(product, vectors, guess, sweep, max_steps=max_steps, tolerance=tolerance)


@dataclass
class _State:
    """The Lanczos and the least squares recursion of the open right-hand sides.

    Vectors ``(k, P)``: the last two Lanczos vectors before and the last one after preconditioning, the last
    two search directions with their products, the residual. Numbers ``(k, 1)``: Lanczos off-diagonals, the
    last two rotations, what is left to minimise, and the largest column of the tridiagonal
    matrix.
    """

    lanczos: Tensor
    lanczos_before: Tensor
    corrected: Tensor
    direction: Tensor
    direction_before: Tensor
    image: Tensor
    image_before: Tensor
    remainder: Tensor
    norm: Tensor
    norm_before: Tensor
    cosine: Tensor
    cosine_before: Tensor
    sine: Tensor
    sine_before: Tensor
    left: Tensor
    size: Tensor
    alive: Tensor

    @classmethod
    def begin(cls, remainder: Tensor, precondition: Product | None) -> _State:
        """Return the state before the first step."""
        corrected = remainder if precondition is None else precondition(remainder)
        norm = _norm(remainder, corrected)
        zero, zeros, ones = torch.zeros_like(remainder), torch.zeros_like(norm), torch.ones_like(norm)
        return cls(
            lanczos=remainder,
            lanczos_before=zero,
            corrected=corrected,
            direction=zero,
            direction_before=zero,
            image=zero,
            image_before=zero,
            remainder=remainder,
            norm=norm,
            norm_before=ones,
            cosine=ones,
            cosine_before=ones,
            sine=zeros,
            sine_before=zeros,
            left=norm,
            size=zeros,
            alive=norm[:, 0] > 0,
        )

    def step(self, product: Product, precondition: Product | None) -> Tensor:
        """Return the change of the solutions by one more product, ``(k, P)``."""
        unit = self.corrected / self.norm
        pushed = product(unit)
        diagonal = (unit * pushed).sum(dim=1, keepdim=True)
        lanczos = pushed - (diagonal / self.norm) * self.lanczos
        lanczos = lanczos - (self.norm / self.norm_before) * self.lanczos_before
        corrected = lanczos if precondition is None else precondition(lanczos)
        norm = _norm(lanczos, corrected)
        # Apply the last two rotations to the new column of the tridiagonal matrix, then find the next.
        pivot = self.cosine * diagonal - self.cosine_before * self.sine * self.norm
        length = torch.sqrt(pivot.square() + norm.square())
        second = self.sine * diagonal + self.cosine_before * self.cosine * self.norm
        third = self.sine_before * self.norm
        scale = length.clamp_min(torch.finfo(length.dtype).tiny)
        cosine, sine = pivot / scale, norm / scale
        direction = (unit - third * self.direction_before - second * self.direction) / scale
        image = (pushed - third * self.image_before - second * self.image) / scale
        # ``length`` is ||A r|| / ||r||, and direction times size grows to the condition of the matrix. Where
        # that reaches the precision and steps gain nothing, the matrix is singular, and what is left of the
        # right-hand side outside of its range.
        self.size = torch.maximum(self.size, torch.sqrt(diagonal.square() + self.norm.square()))
        eps = torch.finfo(norm.dtype).eps
        condition = direction.norm(dim=1, keepdim=True) * self.size
        dead = (length <= eps * self.size) | ((cosine.abs() < _LITTLE) & (condition > eps**-0.75))
        share = torch.where(dead, torch.zeros_like(self.left), cosine * self.left)
        self.remainder = self.remainder - share * image
        self.alive = ((norm > 4 * eps * self.size) & ~dead)[:, 0]
        self.lanczos_before, self.lanczos, self.corrected = self.lanczos, lanczos, corrected
        self.direction_before, self.direction = self.direction, direction
        self.image_before, self.image = self.image, image
        self.norm_before, self.norm = self.norm, norm
        self.cosine_before, self.cosine = self.cosine, cosine
        self.sine_before, self.sine = self.sine, sine
        self.left = -sine * self.left
        return share * direction

    def keep(self, rows: Tensor) -> None:
        """Let go of the right-hand sides that are done."""
        if not bool(rows.all()):
            for entry in fields(self):
                setattr(self, entry.name, getattr(self, entry.name)[rows])


def _norm(vectors: Tensor, corrected: Tensor) -> Tensor:
    """Return ``sqrt(v^T P^{-1} v)``, ``(k, 1)``.

    Raises:
        IndefiniteError: if the preconditioner is not positive definite.
    """
    squared = (vectors * corrected).sum(dim=1, keepdim=True)
    rounding = 8 * torch.finfo(vectors.dtype).eps * vectors.norm(dim=1) * corrected.norm(dim=1)
    if bool((squared[:, 0] < -rounding).any()):
        raise IndefiniteError(
            "MINRES needs a positive definite preconditioner, and this one gives a vector a negative norm. "
            "Refit the factors, raise the damping, or solve without a preconditioner."
        )
    return squared.clamp_min(0).sqrt()
