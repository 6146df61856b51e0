"""Low-rank form of an elementwise inverse, so that scores need no dense gradient.

With one position per example a score is ``sum_ij W_ij (d_q d_n)_i (a_q a_n)_j`` in the eigenbasis, ``W = 1 /
(Lambda + lambda)``. With ``W ~ sum_k u_k w_k^T`` it is ``sum_k (d_q . u_k . d_n)(a_q . w_k . a_n)``: two thin
products a term instead of one over ``D_out D_in``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of the random sketch beyond the rank, and multiplications that sharpen it. Chosen by hand: the usual
# values (Halko, Martinsson & Tropp 2011).
_OVERSAMPLE, _POWER_STEPS = 8, 2


@dataclass(frozen=True)
class LowRank:
    """``W ~ left^T right``.

    Attributes:
        left: ``(r, D_out)``.
        right: ``(r, D_in)``.
        error: ``||s (W - left^T right) a||_F / ||s W a||_F`` under the weights it was fitted with.
    """

    left: Tensor
    right: Tensor
    error: float

    @property
    def rank(self) -> int:
        """``r``."""
        return self.left.shape[0]


def factorise_weights(
    weights: Tensor, row_energy: Tensor, column_energy: Tensor, tolerance: float, max_rank: int
) -> LowRank | None:
    """Find the smallest factorisation of ``weights`` that is accurate where gradients have energy.

    The error of a score is a sum of ``E_ij (d_q d_n)_i (a_q a_n)_j``, whose mean square is ``sum_ij E_ij^2
    s_i^2 a_j^2`` when the coordinates are uncorrelated with second moments ``s_i`` and ``a_j``; so it is the
    matrix ``s_i W_ij a_j`` that a truncated singular value decomposition should approximate.

    Args:
        weights: ``(D_out, D_in)``, positive.
        row_energy: second moments of the output gradients, ``(D_out,)``.
        column_energy: second moments of the inputs, ``(D_in,)``.
        tolerance: largest relative error in the weighted Frobenius norm.
        max_rank: give up beyond this rank.

    Returns:
        The factorisation, or None if ``max_rank`` terms are not enough.
    """
    rows, columns = _floored(row_energy.double()), _floored(column_energy.double())
    scaled = rows[:, None] * weights.double() * columns
    left, values, right = _leading(scaled, max_rank)
    total = float(scaled.square().sum())
    errors = ((total - values.square().cumsum(0)).clamp_min(0) / total).sqrt()
    good = (errors <= tolerance).nonzero()
    if not len(good) or int(good[0]) + 1 > max_rank:
        return None
    rank = int(good[0]) + 1
    return _unscaled(
        left[:, :rank], values[:rank], right[:rank], rows, columns, float(errors[rank - 1]), weights.dtype
    )


def _leading(scaled: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets, a few more than ``rank``, from a random sketch."""
    generator = torch.Generator(device=scaled.device).manual_seed(0)
    size = min(rank + _OVERSAMPLE, *scaled.shape)
    sketch = torch.randn(scaled.shape[1], size, generator=generator, device=scaled.device, dtype=scaled.dtype)
    basis = torch.linalg.qr(scaled @ sketch).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(scaled @ torch.linalg.qr(scaled.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ scaled, full_matrices=False)
    return basis @ left, values, right


def _unscaled(
    left: Tensor,
    values: Tensor,
    right: Tensor,
    rows: Tensor,
    columns: Tensor,
    error: float,
    dtype: torch.dtype,
) -> LowRank:
    """Return terms of the weights from those of the scaled weights."""
    scale = values.sqrt()
    return LowRank(
        ((left * scale) / rows[:, None]).T.to(dtype).contiguous(),
        ((right.T * scale) / columns[:, None]).T.to(dtype).contiguous(),
        error,
    )


def _floored(energy: Tensor) -> Tensor:
    """Return energies kept above zero: queries have a little in directions where training data had none."""
    return energy.clamp_min(0) + 1e-3 * energy.clamp_min(0).mean() + torch.finfo(energy.dtype).tiny
