"""The exact Gauss-Newton matrix, dense: the reference for small models."""

from __future__ import annotations

import torch

from lightning_influence.curvature.gauss_newton import DenseCurvaturePass
from lightning_influence.methods.base import register_method
from lightning_influence.methods.context import note_estimate
from lightning_influence.methods.dense import DenseMethod, as_factors
from lightning_influence.solvers.exact import DenseSolver, check_size


@register_method("exact")
class Exact(DenseMethod):
    """``(G + lambda I)^{-1}`` with the dense Gauss-Newton matrix ``G``, in float64.

    With ``fisher="mixed"``, ``"sampled"`` or ``"empirical"`` the matrix is that estimate instead.
    """

    def prepare(self) -> None:
        """Sum the matrix in one pass; a model that is too large is refused before it."""
        context, options = self.context, self.context.options
        check_size(context.layout.numel, options.max_parameters)
        layout = context.layout
        one_pass = DenseCurvaturePass(context.plan, fisher=options.fisher or "exact", seed=options.seed)
        context.run_on_train(one_pass)
        matrix = self._covered(one_pass.result(context.runner.all_reduce_sum), layout)
        self.mean_weight = one_pass.mean_weight
        note_estimate(context, one_pass.estimated)
        damping = context.resolve_damping(as_factors(context.layout, torch.diagonal(matrix)), "full")
        self.solver = DenseSolver(matrix, context.layout.expand(damping, matrix))
