"""The exact solution with a dense matrix, for small models, and what to do about negative curvature first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import draw_vectors
from lightning_influence.linalg.placement import decompose_symmetric
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError

#: ``"absolute"`` replaces negative eigenvalues by their magnitudes, ``"clip"`` by zero; ``"keep"`` leaves
#: them as they are, and ``"refuse"`` does too, for those who want an error if damping does not outweigh them.
NegativeCurvature = Literal["absolute", "clip", "keep", "refuse"]


@dataclass(frozen=True)
class TreatedMatrix:
    """A symmetric matrix after its negative eigenvalues were dealt with.

    Attributes:
        matrix: ``(P, P)``, to be inverted.
        magnitude: ``|H|``, ``(P, P)``: what damping rules look at.
        negative: number of negative eigenvalues of ``H``, beyond rounding.
        smallest: smallest eigenvalue of ``H``.
        largest: largest eigenvalue of ``H``.
    """

    matrix: Tensor
    magnitude: Tensor
    negative: int
    smallest: float
    largest: float

    def describe(self, how: str) -> str:
        """Return what was found and what was done about it, in words."""
        if not self.negative:
            return f"none: the smallest eigenvalue is {self.smallest:.3g}"
        done = {
            "absolute": "replaced by their magnitudes",
            "clip": "replaced by zero",
            "keep": "kept",
            "refuse": "kept, as the damping outweighs them",
        }[how]
        return (
            f"{self.negative} of {len(self.matrix)} eigenvalues are negative, the smallest "
            f"{self.smallest:.3g} beside a largest of {self.largest:.3g}; {done}"
        )


def treat_negative_curvature(matrix: Tensor, how: NegativeCurvature = "absolute") -> TreatedMatrix:
    """Deal with the negative eigenvalues of a symmetric matrix.

    A damped inverse divides by ``h + lambda``, which is near zero for an eigenvalue ``h`` near ``-lambda``: a
    direction of hardly any curvature would then dominate every answer. ``|H|`` (the saddle-free matrix of
    Dauphin et al. 2014) divides by ``|h| + lambda``, which is at least ``lambda``, changes continuously with
    ``H``, and is ``H`` itself where there is no negative curvature.

    Args:
        matrix: ``H``, ``(P, P)``, symmetric.
        how: what becomes of negative eigenvalues.

    Returns:
        The matrix and what was found, in float64.

    Raises:
        ValueError: if ``how`` is not one of the accepted names.
    """
    if how not in get_args(NegativeCurvature):
        names = ", ".join(repr(name) for name in get_args(NegativeCurvature))
        raise ValueError(f"Got negative_curvature={how!r}; accepted are {names}.")
    matrix = matrix.double()
    values, vectors = decompose_symmetric(matrix, matrix.dtype)
    rounding = torch.finfo(values.dtype).eps * len(values) * values.abs().max().clamp_min(0)
    negative = int((values < -rounding).sum())
    magnitude = matrix if not negative else (vectors * values.abs()) @ vectors.T
    changed = {
        "absolute": magnitude,
        "clip": matrix if not negative else (vectors * values.clamp_min(0)) @ vectors.T,
    }.get(how, matrix)
    return TreatedMatrix(changed, magnitude, negative, float(values[0]), float(values[-1]))


# Chosen by hand: the matrix takes half a GiB, its factors as much again.
MAX_PARAMETERS = 8192


def check_size(numel: int, limit: int = MAX_PARAMETERS, method: str = "exact") -> None:
    """Refuse a dense matrix that is too large.

    Args:
        numel: ``P``, or the size of one matrix that has as many entries as all blocks together.
        limit: largest accepted ``P``.
        method: whose matrix it would be.

    Raises:
        UnsupportedModelError: saying how large the matrix would be.
    """
    if numel > limit:
        raise UnsupportedModelError(
            f"method={method!r} would build a dense {numel:,} x {numel:,} matrix ({8 * numel**2 / 2**30:.1f} "
            f"GiB); at most {limit:,} parameters are accepted. Use method='auto', or cover fewer layers with "
            "`layers=`."
        )


# Vectors and products that extreme eigenvalues are estimated with. Chosen by hand: each product multiplies
# the extreme eigenvector's share by a ratio of eigenvalues, which is large where a matrix is singular.
_PROBES, _POWERS = 4, 3


class DenseSolver:
    """Solves ``(H + diag(damping)) X = V`` in float64, any number of times.

    A factorisation of a singular matrix often succeeds, because rounding leaves eigenvalues of the size of
    rounding where there should be zeros; what is divided by them means nothing. So the smallest eigenvalue is
    looked at.

    Args:
        matrix: ``H``, ``(P, P)``, symmetric.
        damping: ``(P,)``.
        rounding: eigenvalues of ``H`` up to this, relative to the largest, are rounding, because the matrix
            was summed from numbers of a lower precision. Damping that is positive replaces them.

    Attributes:
        smallest: about the smallest magnitude of an eigenvalue of the damped matrix, never below it.
        floor: the magnitude up to which eigenvalues of ``H`` are rounding.
    """

    def __init__(self, matrix: Tensor, damping: Tensor, rounding: float = 0.0) -> None:
        self.matrix = matrix.double() + torch.diag(damping.double())
        self._range = float(damping.min()), float(damping.max())
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        self._factor = factor if int(info) == 0 else None
        self._pivoted = None if self._factor is not None else torch.linalg.lu_factor_ex(self.matrix)[:2]
        largest = self._grow(lambda vectors: vectors @ self.matrix)
        grown = self._grow(self._divide)
        self.smallest = 1.0 / grown if grown > 0 else 0.0
        least = len(matrix) * torch.finfo(torch.float64).eps
        self.floor = max(least, rounding) * largest
        self._is_singular = not self.smallest > (self.floor if self._range[0] == 0 else least * largest)

    @property
    def is_definite(self) -> bool:
        """Whether the damped matrix is positive definite."""
        return self._factor is not None

    def solve(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for ``V (V, P)``.

        Returns:
            ``X (V, P)`` in float64 and the relative residual of each, ``(V,)``.

        Raises:
            NonFiniteError: if the damped matrix is singular.
        """
        right = vectors.double()
        solution = right if self._is_singular else self._divide(right)
        if self._is_singular or not bool(torch.isfinite(solution).all()):
            low, high = self._range
            raise NonFiniteError(
                f"The curvature matrix is singular at damping {low:.3g} to {high:.3g}. "
                f"Use a positive damping, or a larger one: the smallest eigenvalue is about "
                f"{self.smallest:.2g}, and up to {self.floor:.2g} they are rounding."
            )
        remainder = right - solution @ self.matrix
        return solution, remainder.norm(dim=1) / right.norm(dim=1).clamp_min(torch.finfo(right.dtype).tiny)

    def _divide(self, right: Tensor) -> Tensor:
        """Return ``X`` with whichever factors there are; not finite for an exactly singular matrix."""
        if self._factor is not None:
            return torch.cholesky_solve(right.T, self._factor).T
        assert self._pivoted is not None
        solution: Tensor = torch.linalg.lu_solve(*self._pivoted, right.T).T
        return solution

    def _grow(self, multiply: Callable[[Tensor], Tensor]) -> float:
        """Return about the largest magnitude of an eigenvalue, by the power method; infinite on overflow."""
        vectors = draw_vectors(
            _PROBES, len(self.matrix), 0, kind="normal", dtype=torch.float64, device=self.matrix.device
        )
        norms = torch.ones(())
        for _ in range(_POWERS):
            vectors = multiply(vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-300))
            norms = vectors.norm(dim=1)
            if not bool(torch.isfinite(norms).all()):
                return float("inf")
        return float(norms.max())


class BlockSolver:
    """Solves a block-diagonal ``(H + diag(damping)) X = V`` in float64.

    Args:
        blocks: the blocks of ``H``, ``(P_b, P_b)``.
        indices: where each stands in a flat vector, ``(P_b,)``; together ``0 .. P - 1``.
        damping: ``(P,)``.
        rounding: as in :class:`DenseSolver`, of every block.
    """

    def __init__(
        self, blocks: Sequence[Tensor], indices: Sequence[Tensor], damping: Tensor, rounding: float = 0.0
    ) -> None:
        self._indices = list(indices)
        self._solvers = [
            DenseSolver(block, damping[index], rounding) for block, index in zip(blocks, indices, strict=True)
        ]

    def solve(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for ``V (V, P)``.

        Returns:
            ``X (V, P)`` in float64 and the relative residual of each, ``(V,)``.

        Raises:
            NonFiniteError: if a damped block is singular.
        """
        right = vectors.double()
        solution, squares = torch.zeros_like(right), right.new_zeros(len(right))
        for solver, index in zip(self._solvers, self._indices, strict=True):
            own = right[:, index]
            solution[:, index], residual = solver.solve(own)
            squares += (residual * own.norm(dim=1)).square()
        return solution, squares.sqrt() / right.norm(dim=1).clamp_min(torch.finfo(right.dtype).tiny)
