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
from lightning_influence.linalg.lanczos import Recursion
from lightning_influence.linalg.stopping import Progress, Solution, run_sweeps

# A step whose cosine is smaller lowers the residual by less than a twenty-thousandth. Chosen by hand.
_LITTLE = 0.01


def minres(
    product: Product,
    vectors: Tensor,
    *,
    precondition: Product | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-3,
) -> Solution:
    """Solve ``A X = V`` for a symmetric ``A`` that may be indefinite.

    Args:
        product: ``A`` (with its damping).
        vectors: ``V``, ``(V, P)``.
        precondition: ``P^{-1}``, symmetric positive definite.
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

    return run_sweeps(product, vectors, sweep, max_steps=max_steps, tolerance=tolerance)


@dataclass
class _State:
    """The least squares recursion on top of Lanczos', of the open right-hand sides.

    Vectors ``(k, P)``: the last two search directions with their products, the residual. Numbers ``(k, 1)``:
    the last two rotations, what is left to minimise, and the largest column of the tridiagonal matrix.
    """

    lanczos: Recursion
    direction: Tensor
    direction_before: Tensor
    image: Tensor
    image_before: Tensor
    remainder: Tensor
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
        lanczos = Recursion.begin(remainder, precondition)
        zero, zeros, ones = torch.zeros_like(remainder), torch.zeros_like(lanczos.norm), lanczos.norm_before
        return cls(
            lanczos=lanczos,
            direction=zero,
            direction_before=zero,
            image=zero,
            image_before=zero,
            remainder=remainder,
            cosine=ones,
            cosine_before=ones,
            sine=zeros,
            sine_before=zeros,
            left=lanczos.norm,
            size=zeros,
            alive=lanczos.norm[:, 0] > 0,
        )

    def step(self, product: Product, precondition: Product | None) -> Tensor:
        """Return the change of the solutions by one more product, ``(k, P)``."""
        unit, pushed, diagonal = self.lanczos.advance(product, precondition)
        norm, norm_before = self.lanczos.norm, self.lanczos.norm_before
        # Apply the last two rotations to the new column of the tridiagonal matrix, then find the next.
        pivot = self.cosine * diagonal - self.cosine_before * self.sine * norm_before
        length = torch.sqrt(pivot.square() + norm.square())
        second = self.sine * diagonal + self.cosine_before * self.cosine * norm_before
        third = self.sine_before * norm_before
        scale = length.clamp_min(torch.finfo(length.dtype).tiny)
        cosine, sine = pivot / scale, norm / scale
        direction = (unit - third * self.direction_before - second * self.direction) / scale
        image = (pushed - third * self.image_before - second * self.image) / scale
        # ``length`` is ||A r|| / ||r||, and direction times size grows to the condition of the matrix. Where
        # that reaches the precision and steps gain nothing, the matrix is singular, and what is left of the
        # right-hand side outside of its range.
        self.size = torch.maximum(self.size, torch.sqrt(diagonal.square() + norm_before.square()))
        eps = torch.finfo(norm.dtype).eps
        condition = direction.norm(dim=1, keepdim=True) * self.size
        dead = (length <= eps * self.size) | ((cosine.abs() < _LITTLE) & (condition > eps**-0.75))
        share = torch.where(dead, torch.zeros_like(self.left), cosine * self.left)
        self.remainder = self.remainder - share * image
        self.alive = ((norm > 4 * eps * self.size) & ~dead)[:, 0]
        self.direction_before, self.direction = self.direction, direction
        self.image_before, self.image = self.image, image
        self.cosine_before, self.cosine = self.cosine, cosine
        self.sine_before, self.sine = self.sine, sine
        self.left = -sine * self.left
        return share * direction

    def keep(self, rows: Tensor) -> None:
        """Let go of the right-hand sides that are done."""
        if bool(rows.all()):
            return
        for part in (self, self.lanczos):
            for entry in fields(part):
                value = getattr(part, entry.name)
                if isinstance(value, Tensor):
                    setattr(part, entry.name, value[rows])
