"""The exact Gauss-Newton matrix, dense: the reference for small models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_influence.factors.factors import Factors
from lightning_influence.factors.statistics import LayerStatistics
from lightning_influence.methods.base import Gradients, Method, Solved, register_method
from lightning_influence.passes.curvature import DenseCurvaturePass
from lightning_influence.solvers.exact import check_size, solve
from lightning_influence.solvers.scoring import DenseScorer


@register_method("exact")
class Exact(Method):
    """``(G + lambda I)^{-1}`` with the dense Gauss-Newton matrix ``G`` over all training examples, in float64."""

    def prepare(self) -> None:
        """Sum the matrix in one pass; a model that is too large is refused before it."""
        context = self.context
        check_size(context.layout.numel, context.options.max_parameters)
        one_pass = DenseCurvaturePass(context.plan)
        context.runner.run(one_pass, context.train)
        self.matrix = one_pass.result(context.runner.all_reduce_sum)
        damping = context.resolve_damping(self._as_factors(), "full")
        self.damping = context.layout.expand(damping, self.matrix)

    def solve(self, queries: Gradients) -> Solved:
        """Solve densely."""
        solutions, residuals = self.solutions(queries)
        return Solved(DenseScorer(self.context.layout.split(solutions)), residuals)

    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor]:
        """Solve densely."""
        return solve(self.matrix, self.damping, self.context.layout.dense(queries)[0])

    def quadratic(self) -> Callable[[Gradients], Tensor]:
        """Solve for every example of the batch."""
        layout = self.context.layout

        def quadratic(gradients: Gradients) -> Tensor:
            vectors = layout.dense(gradients)[0]
            solutions, _ = solve(self.matrix, self.damping, vectors)
            return (solutions * vectors).sum(dim=1)

        return quadratic

    def _as_factors(self) -> Factors:
        """The diagonal as statistics, which is what damping rules look at."""
        layout = self.context.layout
        blocks = layout.split(torch.diagonal(self.matrix))
        layers = {}
        for name, shape in layout.shapes.items():
            statistics = LayerStatistics.zeros(shape, device=self.matrix.device, dtype=self.matrix.dtype)
            statistics.squares, statistics.squares_examples = blocks[name].clone(), 1.0
            layers[name] = statistics
        return Factors(layers=layers)
