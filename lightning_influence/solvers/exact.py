"""The exact damped solution with a dense curvature matrix, for small models."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError, UnsupportedModelError

MAX_PARAMETERS = 8192


def check_size(numel: int, limit: int = MAX_PARAMETERS) -> None:
    """Refuse a dense matrix that is too large.

    Args:
        numel: ``P``.
        limit: largest accepted ``P``.

    Raises:
        UnsupportedModelError: saying how large the matrix would be.
    """
    if numel > limit:
        raise UnsupportedModelError(
            f"method='exact' would build a dense {numel:,} x {numel:,} matrix ({8 * numel**2 / 2**30:.1f} "
            f"GiB); at most {limit:,} parameters are accepted. Use method='auto', or cover fewer layers with "
            "`layers=`."
        )


def solve(matrix: Tensor, damping: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ``(H + diag(damping)) X = V`` in float64.

    Args:
        matrix: ``H``, ``(P, P)``, symmetric.
        damping: ``(P,)``.
        vectors: ``(V, P)``.

    Returns:
        ``X (V, P)`` in float64 and the relative residual of each, ``(V,)``.

    Raises:
        NonFiniteError: if the damped matrix is singular.
    """
    damped = matrix.double() + torch.diag(damping.double())
    right = vectors.double()
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) == 0:
        solution = torch.cholesky_solve(right.T, factor).T
    else:
        solution, info = torch.linalg.solve_ex(damped, right.T)
        solution = solution.T
    if int(info) != 0 or not bool(torch.isfinite(solution).all()):
        raise NonFiniteError(
            f"The curvature matrix is singular at damping {float(damping.min()):.3g} to "
            f"{float(damping.max()):.3g}. Use a positive damping."
        )
    remainder = right - solution @ damped
    return solution, remainder.norm(dim=1) / right.norm(dim=1).clamp_min(torch.finfo(right.dtype).tiny)
