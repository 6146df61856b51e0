"""Inner products and orthonormal bases of long vectors, made in the memory of the vectors.

A Householder factorisation would hold the vectors twice. Here their Gram matrix, which is small, is summed in
float64 and diagonalised, and what follows from it is applied to the vectors block of columns by block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, float64

from lightning_influence.support.long_products import multiply_long

# Columns that are converted, or mixed in place, at once. Chosen by hand: 128 vectors take 8 MiB in float64.
_COLUMNS = 2**13


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right.T`` with sums in float64, for vectors ``(V, P)`` and ``(W, P)`` in rows."""
    result = left.new_zeros(len(left), len(right), dtype=float64)
    for start in range(0, left.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        result += left[:, columns].double() @ right[:, columns].double().T
    return result


def orthonormalise(
    vectors: Tensor,
    outside: Sequence[Tensor] = (),
    *,
    scale: float | None = None,
    least: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find an orthonormal basis of what vectors have outside of a space, and take their place with it.

    Args:
        vectors: ``(M, P)``; overwritten.
        outside: orthonormal bases ``(m_i, P)``, orthogonal to each other, of the space that is left out.
        scale: what the vectors are measured against; the norm of each itself if None.
        least: directions whose singular value among the scaled vectors is below this are left out as
            numerically dependent; if None, what rounding of that many vectors makes.

    Returns:
        ``Q (m, P)``, and ``mixing (m, M)`` and ``shares (m, sum m_i)`` with ``Q = mixing @ vectors - shares @
        outside``.
    """
    norms = vectors.norm(dim=1, keepdim=True)
    sizes = (
        norms.clamp_min(torch.finfo(vectors.dtype).tiny) if scale is None else norms.new_full((1, 1), scale)
    )
    vectors.div_(sizes)
    # Chosen by hand: four times what as many terms of rounding add up to at most.
    rounding = 4 * len(vectors) * torch.finfo(vectors.dtype).eps
    # Twice: a single projection leaves rounding errors of the size of what it removed, and the conditioning
    # of the first Gram matrix costs its basis orthogonality, which the second restores.
    shares = _project_out(vectors, outside) + _project_out(vectors, outside)
    basis, first = _whiten(vectors, rounding if least is None else least**2, relative=least is None)
    shares = first @ shares + _project_out(basis, outside)
    basis, second = _whiten(basis, rounding, relative=True)
    mixing = second @ first / sizes.double().T
    return basis, mixing.to(basis.dtype), (second @ shares).to(basis.dtype)


def _project_out(vectors: Tensor, outside: Sequence[Tensor]) -> Tensor:
    """Return the coordinates of the part inside a space, in float64; it is taken out of the vectors."""
    shares = [vectors.new_zeros(len(vectors), 0, dtype=float64)]
    for block in outside:
        share = multiply_long(vectors, block.T)
        vectors.addmm_(share, block, alpha=-1)
        shares.append(share.double())
    return torch.cat(shares, dim=1)


def _whiten(vectors: Tensor, floor: float, *, relative: bool) -> tuple[Tensor, Tensor]:
    """Return orthonormal ``W V``, in the memory of the vectors, and ``W (m, M)`` in float64.

    Args:
        vectors: overwritten.
        floor: eigenvalues of the Gram matrix up to this are taken for rounding.
        relative: whether the floor is relative to the largest eigenvalue where that is above 1.
    """
    values, directions = torch.linalg.eigh(inner(vectors, vectors))
    if relative and len(values):
        floor *= max(1.0, float(values[-1]))
    kept = values > floor
    weights = (directions[:, kept] / values[kept].sqrt()).T
    result, mixing = vectors[: len(weights)], weights.to(vectors.dtype)
    for start in range(0, vectors.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        result[:, columns] = mixing @ vectors[:, columns]
    # A view of fewer rows would hold the memory of all.
    return result if len(result) == len(vectors) else result.clone(), weights
