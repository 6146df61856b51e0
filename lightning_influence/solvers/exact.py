"""The exact damped solution with a dense curvature matrix, for small models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError, UnsupportedModelError

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


class DenseSolver:
    """Solves ``(H + diag(damping)) X = V`` in float64, any number of times.

    Args:
        matrix: ``H``, ``(P, P)``, symmetric.
        damping: ``(P,)``.
    """

    def __init__(self, matrix: Tensor, damping: Tensor) -> None:
        self.matrix = matrix.double() + torch.diag(damping.double())
        self._range = float(damping.min()), float(damping.max())
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        self._factor = factor if int(info) == 0 else None

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
        right, info = vectors.double(), torch.zeros(())
        if self._factor is not None:
            solution = torch.cholesky_solve(right.T, self._factor).T
        else:
            solution, info = torch.linalg.solve_ex(self.matrix, right.T)
            solution = solution.T
        if int(info) != 0 or not bool(torch.isfinite(solution).all()):
            low, high = self._range
            raise NonFiniteError(
                f"The curvature matrix is singular at damping {low:.3g} to {high:.3g}. "
                "Use a positive damping."
            )
        remainder = right - solution @ self.matrix
        return solution, remainder.norm(dim=1) / right.norm(dim=1).clamp_min(torch.finfo(right.dtype).tiny)


class BlockSolver:
    """Solves a block-diagonal ``(H + diag(damping)) X = V`` in float64.

    Args:
        blocks: the blocks of ``H``, ``(P_b, P_b)``.
        indices: where each stands in a flat vector, ``(P_b,)``; together ``0 .. P - 1``.
        damping: ``(P,)``.
    """

    def __init__(self, blocks: Sequence[Tensor], indices: Sequence[Tensor], damping: Tensor) -> None:
        self._indices = list(indices)
        self._solvers = [
            DenseSolver(block, damping[index]) for block, index in zip(blocks, indices, strict=True)
        ]

    def solve(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for ``V (V, P)``.

        Returns:
            ``X (V, P)`` in float64 and the relative residual of each, ``(V,)``.
        """
        right = vectors.double()
        solution, squares = torch.zeros_like(right), right.new_zeros(len(right))
        for solver, index in zip(self._solvers, self._indices, strict=True):
            own = right[:, index]
            solution[:, index], residual = solver.solve(own)
            squares += (residual * own.norm(dim=1)).square()
        return solution, squares.sqrt() / right.norm(dim=1).clamp_min(torch.finfo(right.dtype).tiny)


def solve(matrix: Tensor, damping: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return one solution; see :class:`DenseSolver`."""
    return DenseSolver(matrix, damping).solve(vectors)
