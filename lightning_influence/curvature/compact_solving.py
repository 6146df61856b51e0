"""Closed-form answers ``P^{-1} g`` of one layer, cut to a low rank before they are ever formed in whole.

In the eigenbasis the answer is the rotated gradient times a weight an entry, and cutting it there is cutting
it anywhere: a rotation changes no singular value. So only the factors that are left are rotated back, ``r
(D_out^2 + D_in^2)`` operations in place of ``D_out D_in (D_out + D_in)``, and those of a gradient with few
positions are rotated on the way in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

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
)
from lightning_influence.model.layers.gradients import FactoredGradients, LayerGradients, rotate_matrices
from lightning_influence.model.layers.table_gradients import TableGradients

# Chosen by hand: bytes of answers that are formed in the basis at once.
_FORMED_BYTES = 2**25
# Columns are picked where the others, all zero, leave at most such a part of them.
_FEW = 2


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
    cut = partial(compress, rank=rank)
    return join_matrices([_answer(inverse, cut, *few) for few in _weigh(inverse, gradients, dtype)])


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
    cut = partial(compress_within, tolerance=tolerance)
    return join_matrices([_answer(inverse, cut, *few) for few in _weigh(inverse, gradients, dtype)])


def _weigh(
    inverse: EigenInverse, gradients: LayerGradients, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Yield answers in the basis, ``(V, G, D_out', D_in')``, a few at a time, and their rows and columns."""
    basis, weights, rows = inverse.basis, inverse.weights, None
    if (
        isinstance(gradients, TableGradients)
        and not gradients.maps
        and (basis is None or basis.outputs is None)
    ):
        rows = torch.unique(gradients.rows)
        rows = rows if len(rows) else rows.new_zeros(1)
        gradients, weights = gradients.restrict(rows), weights[:, rows]
    step = max(1, _FORMED_BYTES // weights.nbytes)
    for start in range(0, max(1, gradients.num_examples), step):
        few = gradients.select(slice(start, start + step))
        rotated, columns = pick_columns(few if basis is None else rotate(few, basis))
        own = weights if columns is None else weights[:, :, columns]
        yield rotated.dense()[0].to(dtype) * own, rows, columns


def pick_columns(gradients: LayerGradients) -> tuple[LayerGradients, Tensor | None]:
    """Return gradients in the columns alone that are not zero in all of them, and which these are.

    Returns:
        The gradients as they are and None where most columns are not zero, where that is not told by their
        inputs, and on an accelerator, which would have to be waited for.
    """
    if not isinstance(gradients, FactoredGradients) or gradients.like.device.type != "cpu":
        return gradients, None
    columns = gradients.inputs.flatten(0, 2).abs().sum(dim=0).nonzero().flatten()
    if not 0 < len(columns) <= gradients.shape[2] // _FEW:
        return gradients, None
    return FactoredGradients(gradients.inputs[..., columns], gradients.outputs), columns


def place(values: Tensor, index: Tensor | None, dim: int, width: int) -> Tensor:
    """Return values with zeros in the places of a dimension that an index does not name; None names all."""
    if index is None:
        return values
    shape = [*values.shape[:dim], width, *values.shape[dim + 1 :]]
    return values.new_zeros(shape).index_copy_(dim, index, values)


def _answer(
    inverse: EigenInverse,
    cut: Callable[[Tensor], Matrices],
    formed: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
) -> Matrices:
    """Return answers cut and out of the basis, with rows and columns of zeros where there were none."""
    d_out, d_in = inverse.eigenvalues.shape[1:]
    found = cut(formed)
    if columns is not None and isinstance(found, DenseMatrices):  # small beside those of all columns
        found, columns = cut(place(formed, columns, 3, d_in)), None
    back = inverse.back
    if isinstance(found, DenseMatrices):
        matrices = rotate_matrices(found.matrices, back.inputs, back.outputs)
        return DenseMatrices(place(matrices, rows, 2, d_out))
    assert isinstance(found, LowRankMatrices)
    left = turn_columns(found.left, back.outputs)
    right = turn_columns(place(found.right, columns, 2, d_in), back.inputs)
    return LowRankMatrices(place(left, rows, 2, d_out), right)
