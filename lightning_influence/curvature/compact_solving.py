"""Closed-form answers ``P^{-1} g`` of one layer, cut to a low rank before they are ever formed in whole.

In the eigenbasis the answer is the rotated gradient times a weight an entry, and cutting it there is cutting
it anywhere: a rotation changes no singular value. So only the factors that are left are rotated back, ``r
(D_out^2 + D_in^2)`` operations in place of ``D_out D_in (D_out + D_in)``, and those of a gradient with few
positions are rotated on the way in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_influence.curvature.factors import rotate
from lightning_influence.curvature.inverse import EigenInverse
from lightning_influence.curvature.low_rank_matrices import (
    DenseMatrices,
    LowRankMatrices,
    Matrices,
    compress,
    compress_within,
    join_matrices,
    turn_columns,
    turn_matrices,
)
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.table_gradients import TableGradients

# Chosen by hand: bytes of answers that are formed in the basis at once.
_FORMED_BYTES = 2**25


def solve_in_rank(
    inverse: EigenInverse, gradients: LayerGradients, rank: int, dtype: torch.dtype
) -> Matrices:
    """Return ``P^{-1} g`` cut to a rank, or as it is where that takes no more memory.

    Args:
        inverse: of the layer.
        gradients: of its examples, ``K = 1``.
        rank: of the answers, at most.
        dtype: their precision.

    Returns:
        One matrix an example.
    """
    parts = [
        _turn_back(inverse, compress(formed, rank), rows)
        for formed, rows in _weigh(inverse, gradients, dtype)
    ]
    return join_matrices(parts)


def solve_within(
    inverse: EigenInverse, gradients: LayerGradients, tolerance: float, dtype: torch.dtype
) -> Matrices:
    """Return ``P^{-1} g`` in the smallest form whose relative error is tolerated.

    Args:
        inverse: of the layer.
        gradients: of its examples, ``K = 1``.
        tolerance: largest relative error in norm, root mean square over the examples; 0 for whole matrices.
        dtype: precision of the answers.

    Returns:
        One matrix an example: products of low rank where these take less memory.
    """
    if tolerance <= 0:
        return DenseMatrices(inverse.apply(gradients.dense()[0].to(dtype)))
    parts = [
        _turn_back(inverse, compress_within(formed, tolerance), rows)
        for formed, rows in _weigh(inverse, gradients, dtype)
    ]
    return join_matrices(parts)


def _weigh(
    inverse: EigenInverse, gradients: LayerGradients, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield answers in the basis, ``(V, G, D_out', D_in)``, a few at a time, and which rows they have."""
    basis, weights, rows = inverse.basis, inverse.weights, None
    if (
        isinstance(gradients, TableGradients)
        and not gradients.maps
        and (basis is None or basis.q_out is None)
    ):
        rows = torch.unique(gradients.rows)
        rows = rows if len(rows) else rows.new_zeros(1)
        gradients, weights = gradients.restrict(rows), weights[:, rows]
    step = max(1, _FORMED_BYTES // weights.nbytes)
    for start in range(0, max(1, gradients.num_examples), step):
        few = gradients.select(slice(start, start + step))
        rotated = few if basis is None else rotate(few, basis)
        yield rotated.dense()[0].to(dtype) * weights, rows


def _turn_back(inverse: EigenInverse, found: Matrices, rows: Tensor | None) -> Matrices:
    """Return answers out of the basis, with rows of zeros where there were none."""
    basis = inverse.basis
    q_in, q_out = (None, None) if basis is None else (basis.q_in, basis.q_out)
    if isinstance(found, DenseMatrices):
        matrices = turn_matrices(found.matrices, q_in, q_out)
        return DenseMatrices(matrices if rows is None else _place(matrices, rows, inverse))
    assert isinstance(found, LowRankMatrices)
    left, right = turn_columns(found.left, q_out), turn_columns(found.right, q_in)
    return LowRankMatrices(left if rows is None else _place(left, rows, inverse), right)


def _place(values: Tensor, rows: Tensor, inverse: EigenInverse) -> Tensor:
    """Return ``(V, G, D_out, k)`` with some of the rows given."""
    whole = values.new_zeros(*values.shape[:2], inverse.eigenvalues.shape[1], values.shape[3])
    whole[:, :, rows] = values
    return whole
