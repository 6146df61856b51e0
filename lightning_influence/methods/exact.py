"""The exact Gauss-Newton matrix, dense: the reference for small models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_influence.curvature.gauss_newton import DenseCurvaturePass
from lightning_influence.factors.factors import Factors
from lightning_influence.factors.statistics import LayerStatistics
from lightning_influence.layers.layout import Layout
from lightning_influence.methods.base import Gradients, Method, Solved, register_method
from lightning_influence.solvers.exact import DenseSolver, check_size
from lightning_influence.solvers.scoring import DenseScorer


@register_method("exact")
class Exact(Method):
    """``(G + lambda I)^{-1}`` with the dense Gauss-Newton matrix ``G``, in float64."""

    def prepare(self) -> None:
        """Sum the matrix in one pass; a model that is too large is refused before it."""
        context = self.context
        check_size(context.layout.numel, context.options.max_parameters)
        layout = context.layout
        one_pass = DenseCurvaturePass(context.plan)
        context.run_on_train(one_pass)
        matrix = one_pass.result(context.runner.all_reduce_sum)
        self.mean_weight = one_pass.normaliser / one_pass.examples
        kept = layout.expand({name: float(name in context.plan.layers) for name in layout.shapes}, matrix) > 0
        matrix = matrix if bool(kept.all()) else matrix[kept][:, kept]
        damping = context.resolve_damping(_as_factors(context.layout, matrix), "full")
        self.solver = DenseSolver(matrix, context.layout.expand(damping, matrix))

    def solve(self, queries: Gradients) -> Solved:
        """Return the solutions: solve densely."""
        solutions, residuals = self.solutions(queries)
        return Solved(DenseScorer(self.context.layout.split(solutions)), residuals)

    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor]:
        """Return the solutions: solve densely."""
        return self.solver.solve(self.context.layout.dense(queries)[0])

    def quadratic(self) -> Callable[[Gradients], Tensor]:
        """Return the solutions: solve for every example of the batch."""
        layout = self.context.layout

        def quadratic(gradients: Gradients) -> Tensor:
            vectors = layout.dense(gradients)[0]
            solutions, _ = self.solver.solve(vectors)
            return (solutions * vectors).sum(dim=1)

        return quadratic


def _as_factors(layout: Layout, matrix: Tensor) -> Factors:
    """Return the diagonal as statistics, which is what damping rules look at."""
    blocks = layout.split(torch.diagonal(matrix))
    layers = {}
    for name, shape in layout.shapes.items():
        statistics = LayerStatistics.zeros(shape, device=matrix.device, dtype=matrix.dtype)
        statistics.squares, statistics.squares_examples = blocks[name].clone(), 1.0
        layers[name] = statistics
    return Factors(layers=layers)
