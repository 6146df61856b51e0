"""Matrices cut to a low rank, many at once."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of the random sketch beyond the rank, and multiplications that sharpen it. Chosen by hand: the usual
# values (Halko, Martinsson & Tropp 2011).
_OVERSAMPLE, _POWER_STEPS = 4, 1
# The sketch has a multiple of so many columns: products with 16 of them take half the time of those with 6.
_MULTIPLE = 16
# Chosen by hand: how far an error has to be above the rounding of an energy to show in a difference of two.
_ROUNDED = 10
# Chosen by hand: the rank that is tried first, and what it is multiplied by where it is not enough.
_FIRST_RANK, _RAISE = 8, 4


def truncate(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Cut matrices to a rank, nearly as their singular value decompositions would.

    The left factors are orthonormal, and the product is the projection of a matrix on their span: that is a
    good answer whatever the sketch has missed, never a wild one.

    Args:
        matrices: ``(..., D_out, D_in)``.
        rank: ``r``, at least 1.

    Returns:
        ``left (..., D_out, r)`` and ``right (..., D_in, r)`` of ``matrices ~ left right^T``; a smaller ``r``
        where a dimension of the matrices is smaller.
    """
    rank = min(rank, *matrices.shape[-2:])
    size = min(-(-(rank + _OVERSAMPLE) // _MULTIPLE) * _MULTIPLE, *matrices.shape[-2:])
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same on every device
    sketch = torch.randn(matrices.shape[-1], size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrices @ sketch.to(matrices)).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(matrices @ torch.linalg.qr(matrices.mT @ basis).Q).Q
    small = basis.mT @ matrices  # (..., size, D_in)
    exact = small.double()  # of squares, which single precision does not tell apart below 3e-4 of the largest
    vectors = torch.linalg.eigh(exact @ exact.mT).eigenvectors[..., -rank:].to(matrices.dtype)
    return basis @ vectors, small.mT @ vectors  # which is matrices^T left


def truncate_within(matrices: Tensor, tolerance: float, most: int) -> tuple[Tensor, Tensor] | None:
    """Cut matrices to the smallest rank whose relative error, root mean square over them, is tolerated.

    Args:
        matrices: ``(V, G, D_out, D_in)``.
        tolerance: largest relative error in the Frobenius norm.
        most: give up beyond this rank.

    Returns:
        What :func:`truncate` returns; None if the rank ``most`` is not enough.
    """
    most = min(most, *matrices.shape[-2:])
    energies = torch.linalg.vector_norm(matrices.flatten(1), dim=1, dtype=torch.float64).square()
    energies = energies.clamp_min(torch.finfo(matrices.dtype).tiny)
    rank = min(_FIRST_RANK, most)
    while rank >= 1:
        left, right = truncate(matrices, rank)
        # Left factors are orthonormal, their columns in ascending order of what they take along.
        kept = right.double().square().sum(dim=(1, -2))  # (V, r)
        if tolerance**2 > _ROUNDED * torch.finfo(matrices.dtype).eps:
            left_out = energies[:, None] - kept.flip(1).cumsum(1)
        else:  # a difference of energies would be rounding
            rest = torch.linalg.vector_norm(
                (matrices - left @ right.mT).flatten(1), dim=1, dtype=torch.float64
            )
            dropped = kept.cumsum(1).flip(1) - kept.flip(1)
            left_out = rest.square()[:, None] + dropped
        errors = (left_out / energies[:, None]).clamp_min(0).mean(0)
        enough = (errors <= tolerance**2).nonzero().flatten()
        if len(enough):
            rank = int(enough[0]) + 1
            return left[..., -rank:], right[..., -rank:]
        if rank == most:
            break
        rank = min(_RAISE * rank, most)
    return None
