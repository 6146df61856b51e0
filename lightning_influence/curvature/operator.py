"""The curvature of the training loss as an operator on flat vectors: what solvers and the spectrum work with.

An operator is undamped and linear: ``v -> H v`` for ``H`` an average over the training examples, in the unit
of the mean per-example loss. Damping is added by :class:`Damped`, once and alike for every curvature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_influence.curvature.blocks import (
    BlockProductPass,
    Blocks,
    DenseBlockPass,
    block_indices,
    join_blocks,
)
from lightning_influence.curvature.gauss_newton import CurvatureProductPass, DenseCurvaturePass
from lightning_influence.curvature.hessian import DenseHessianPass, HessianProductPass
from lightning_influence.curvature.operator_base import CurvatureOperator as CurvatureOperator
from lightning_influence.curvature.operator_base import Damped as Damped
from lightning_influence.curvature.operator_base import LinearOperator as LinearOperator
from lightning_influence.curvature.operator_base import Source as Source
from lightning_influence.passes.captured import Fisher


class HessianOperator(CurvatureOperator):
    """The exact Hessian of the average per-example training loss; it may be indefinite."""

    def _product_pass(self, vectors: Tensor, seed: int) -> HessianProductPass:
        return HessianProductPass(self.plan, vectors)

    def _dense_pass(self) -> DenseHessianPass:
        return DenseHessianPass(self.plan)


class GaussNewtonOperator(CurvatureOperator):
    """The Gauss-Newton matrix of the average per-example training loss, or an estimate of it.

    Args:
        source: runner, layers and training data.
        fisher: ``"exact"`` for the matrix itself, ``"mixed"`` for random mixtures of its columns and
            ``"sampled"`` for labels drawn from the model (both drawn anew for every seed of a minibatch),
            ``"empirical"`` for the training labels (biased).
        draws: mixtures or sampled labels per example.
        mean_weight: see :class:`CurvatureOperator`.
    """

    def __init__(
        self,
        source: Source,
        *,
        fisher: Fisher = "exact",
        draws: int = 1,
        mean_weight: float | None = None,
    ) -> None:
        super().__init__(source, mean_weight=mean_weight)
        self.fisher, self.draws = fisher, draws

    def _product_pass(self, vectors: Tensor, seed: int) -> CurvatureProductPass:
        return CurvatureProductPass(self.plan, vectors, fisher=self.fisher, draws=self.draws, seed=seed)

    def _dense_pass(self) -> DenseCurvaturePass | DenseBlockPass:
        return DenseCurvaturePass(self.plan, fisher=self.fisher, draws=self.draws)


class BlockOperator(GaussNewtonOperator):
    """The block-diagonal Gauss-Newton matrix: no cross terms between layers, or between tensors.

    Args:
        source: runner, layers and training data.
        blocks: ``"layer"``, or ``"tensor"`` for a layer's weight and bias apart.
        fisher: see :class:`GaussNewtonOperator`.
        draws: see :class:`GaussNewtonOperator`.
        mean_weight: see :class:`CurvatureOperator`.
    """

    def __init__(
        self,
        source: Source,
        *,
        blocks: Blocks = "layer",
        fisher: Fisher = "exact",
        draws: int = 1,
        mean_weight: float | None = None,
    ) -> None:
        super().__init__(source, fisher=fisher, draws=draws, mean_weight=mean_weight)
        block_indices(self.plan, blocks)  # refuses other values
        self.blocks = blocks

    def _product_pass(self, vectors: Tensor, seed: int) -> BlockProductPass:
        return BlockProductPass(
            self.plan, vectors, blocks=self.blocks, fisher=self.fisher, draws=self.draws, seed=seed
        )

    def _dense_pass(self) -> _JoinedBlocks:
        return _JoinedBlocks(self.plan, blocks=self.blocks, fisher=self.fisher, draws=self.draws)


class _JoinedBlocks(DenseBlockPass):
    """The blocks as one matrix."""

    def result(self, all_reduce_sum: Callable[[Tensor], Tensor] | None = None) -> Any:
        """Return the block-diagonal matrix ``(P, P)``."""
        return join_blocks(super().result(all_reduce_sum), self.indices)
