"""Solved queries of one layer as matrices of low rank, cut where training gradients have little energy."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.curvature.compact_solving import pick_columns, place
from lightning_influence.curvature.factors import rotate
from lightning_influence.curvature.inverse import EigenInverse
from lightning_influence.curvature.low_rank_matrices import (
    DenseMatrices,
    LowRankMatrices,
    Matrices,
    join_matrices,
    turn_columns,
)
from lightning_influence.linalg.truncation import truncate_within
from lightning_influence.model.layers.gradients import LayerGradients, rotate_matrices

# Chosen by hand: smaller layers take too little memory and time to gain by it.
_SMALLEST = 2**14
# Matrices are kept in low rank if that takes this many times less memory.
_SMALLER = 2
# Chosen by hand: least energy of a direction in the mean one's, where no training gradient has any.
_FLOOR = 1e-6
# Chosen by hand: bytes of solved queries that are formed at once.
_FORMED_BYTES = 2**25


def compress_solved(
    inverse: EigenInverse, queries: LayerGradients, tolerance: float, most: int | None = None
) -> Matrices | None:
    """Solve queries of one layer a few at a time, and keep of each solution what scores are made of.

    In the eigenbasis entry ``(i, j)`` of a training gradient has the mean square ``Lambda_ij``, nearly an
    outer product of the energies of rows and columns, so a solution ``x`` is cut as a matrix whose rows and
    columns are weighed by the roots of these: what is left out then changes scores ``x . g`` least. Factors
    alone are rotated back, a fraction of the work that whole solutions would take.

    Args:
        inverse: the layer's.
        queries: gradients of ``Q`` queries, ``K = 1``.
        tolerance: relative error of scores, root mean square over the queries, as long as coordinates of
            training gradients are independent.
        most: largest rank; the one that takes half of the memory if that is less, or None.

    Returns:
        The ``Q`` solutions. Where such a rank is not accurate enough they are as they are if all were formed
        at once, and None else; None as well if the layer is small.
    """
    _, d_out, d_in = inverse.eigenvalues.shape
    half = d_out * d_in // (_SMALLER * (d_out + d_in))
    most = half if most is None else min(most, half)
    if inverse.eigenvalues.numel() < _SMALLEST or most < 1:
        return None
    rows, columns = (_find_weights(inverse.eigenvalues, dim) for dim in (2, 1))
    basis, back, parts = inverse.basis, inverse.back, list[Matrices]()
    step = max(1, _FORMED_BYTES // inverse.eigenvalues.nbytes)
    for start in range(0, queries.num_examples, step):
        few = queries.select(slice(start, start + step))
        rotated, kept = pick_columns(few if basis is None else rotate(few, basis))
        weights, along = (x if kept is None else x[..., kept] for x in (inverse.weights, columns))
        scaled = (rotated.dense()[0] * weights).mul_(rows[:, :, None]).mul_(along[:, None])
        cut = truncate_within(scaled, tolerance, most)
        if cut is None and few.num_examples < queries.num_examples:
            return None
        if cut is None:
            weighed = scaled.div_(rows[:, :, None]).div_(along[:, None])
            whole = place(weighed, kept, 3, d_in)
            return DenseMatrices(rotate_matrices(whole, back.inputs, back.outputs))
        left, right = cut[0] / rows[:, :, None], place(cut[1] / along[:, :, None], kept, 2, d_in)
        parts.append(LowRankMatrices(turn_columns(left, back.outputs), turn_columns(right, back.inputs)))
    return join_matrices(parts)


def _find_weights(eigenvalues: Tensor, dim: int) -> Tensor:
    """Return roots of the energies ``(G, D)`` that eigenvalues show once they are summed over a dimension."""
    energies = eigenvalues.sum(dim, dtype=torch.float64).clamp_min(0)
    energies = energies / energies.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return (energies + _FLOOR).sqrt().to(eigenvalues)
