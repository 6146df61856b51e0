"""The block-diagonal Gauss-Newton matrix, exact and dense within each block."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.blocks import DenseBlockPass, block_indices
from lightning_influence.methods.base import register_method
from lightning_influence.methods.context import note_estimate
from lightning_influence.methods.dense import DenseMethod, as_factors
from lightning_influence.solvers.exact import BlockSolver, check_size


@register_method("block_ggn")
class BlockGGN(DenseMethod):
    """``(G + lambda I)^{-1}`` without the cross terms between layers, or between tensors, in float64.

    It is what EK-FAC approximates: the blocks have their own eigenvectors here, not those of a Kronecker
    product. The option ``blocks`` is ``"layer"``, or ``"tensor"`` for a layer's weight and bias apart;
    ``fisher="mixed"``, ``"sampled"`` or ``"empirical"`` replaces the blocks by that estimate.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"blocks"})

    def prepare(self) -> None:
        """Sum the blocks in one pass; a model that is too large is refused before it."""
        context, options = self.context, self.context.options
        sizes = [len(index) for index in block_indices(context.plan, options.blocks)]
        # As many entries as the largest dense matrix that is accepted.
        check_size(int(sum(size**2 for size in sizes) ** 0.5), options.max_parameters, "block_ggn")
        one_pass = DenseBlockPass(
            context.plan, blocks=options.blocks, fisher=options.fisher or "exact", seed=options.seed
        )
        context.run_on_train(one_pass)
        found = one_pass.result(context.runner.all_reduce_sum)
        blocks = [
            block for block, name in zip(found, one_pass.owners, strict=True) if name in context.plan.layers
        ]
        self.mean_weight = one_pass.mean_weight
        note_estimate(context, one_pass.estimated)
        indices = [index.to(found[0].device) for index in block_indices(context.plan, options.blocks)]
        diagonal = _joined([torch.diagonal(block) for block in blocks], indices)
        damping = context.resolve_damping(as_factors(context.layout, diagonal), "closed")
        self.solver = BlockSolver(blocks, indices, context.layout.expand(damping, diagonal))


def _joined(parts: list[Tensor], indices: list[Tensor]) -> Tensor:
    result = parts[0].new_empty(sum(map(len, indices)))
    for part, index in zip(parts, indices, strict=True):
        result[index] = part
    return result
