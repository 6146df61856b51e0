"""The low-rank route: queries of one layer as sums of few outer products."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.factors.inverse import EigenInverse
from lightning_influence.factors.low_rank import LowRank, low_rank
from lightning_influence.layers.factored import FactoredGradients

# Entries of an intermediate that should stay in a processor's cache.
_CACHED = 2**18


class Thin:
    """Queries of one layer in low-rank form, rotated back so that training factors need no rotation.

    Args:
        inverse: the layer's inverse.
        queries: factored gradients with one position.
        form: low-rank form of the inverse's weights.
    """

    def __init__(self, inverse: EigenInverse, queries: FactoredGradients, form: LowRank) -> None:
        inputs, outputs = queries.inputs[0, :, 0], queries.outputs[0, 0, :, 0]
        basis = inverse.basis
        if basis is not None:
            inputs, outputs = inputs @ basis.q_in[0], outputs @ basis.q_out[0]
        left = outputs[:, None] * form.left  # (Q, r, D_out)
        right = inputs[:, None] * form.right
        if basis is not None:
            left, right = left @ basis.q_out[0].T, right @ basis.q_in[0].T
        self.rank, self.count = form.rank, inputs.shape[0]
        self.left, self.right = left.contiguous(), right.contiguous()

    def scores(self, gradients: FactoredGradients) -> Tensor:
        """Return ``(Q, B)``, a few queries at a time so that the terms are summed while in the cache."""
        _, examples, positions, _ = gradients.inputs.shape
        outputs = gradients.outputs[0, 0].flatten(0, 1).T.contiguous()
        inputs = gradients.inputs[0].flatten(0, 1).T.contiguous()
        result = outputs.new_empty(self.count, examples)
        step = max(1, _CACHED // (self.rank * outputs.shape[1]))
        for start in range(0, self.count, step):
            rows = slice(start, start + step)
            left = (self.left[rows].flatten(0, 1) @ outputs).view(-1, self.rank, examples, positions)
            right = (self.right[rows].flatten(0, 1) @ inputs).view(-1, self.rank, examples, positions)
            if positions == 1:
                result[rows] = left.mul_(right).sum(dim=(1, 3))
            else:
                result[rows] = torch.einsum("qkbr,qkbs->qb", left, right)
        return result


def factorise(inverse: EigenInverse, tolerance: float, max_rank: int) -> LowRank | None:
    """Return low-rank form of one layer's weights, weighed by the energy its eigenvalues show."""
    if max_rank < 1:
        return None
    eigenvalues = inverse.eigenvalues[0]
    return low_rank(inverse.weights[0], eigenvalues.sum(1), eigenvalues.sum(0), tolerance, max_rank)
