"""What methods with an explicit matrix share: solving densely, in float64, for small models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lightning_influence.factors.factors import Factors
from lightning_influence.factors.statistics import LayerStatistics
from lightning_influence.layers.layout import Layout
from lightning_influence.methods.base import Gradients, Method, Solved
from lightning_influence.solvers.scoring import DenseScorer


class Solver(Protocol):
    """Solves its system for flat vectors."""

    def solve(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Solutions ``(V, P)`` in float64, and the relative residual of each, ``(V,)``."""
        ...


class DenseMethod(Method):
    """A method whose :meth:`prepare` leaves a solver of the damped system."""

    solver: Solver

    @abstractmethod
    def prepare(self) -> None:
        """Sum the matrix in one pass, decide the damping, make the solver."""

    def solve(self, queries: Gradients) -> Solved:
        """Return the solutions: solve densely."""
        solutions, residuals = self.solutions(queries)
        return Solved(DenseScorer(self.context.layout.split(solutions)), residuals)

    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor]:
        """Return the solutions: solve densely."""
        return self.solver.solve(self.context.layout.dense(queries)[0])

    def quadratic(self) -> Callable[[Gradients], Tensor]:
        """Return the function that solves for every example of a batch."""
        layout = self.context.layout

        def quadratic(gradients: Gradients) -> Tensor:
            vectors = layout.dense(gradients)[0]
            solutions, _ = self.solver.solve(vectors)
            return (solutions * vectors).sum(dim=1)

        return quadratic

    def _covered(self, matrix: Tensor, layout: Layout) -> Tensor:
        """Return the rows and columns of the layers that are still in the plan.

        Args:
            matrix: ``(P, P)``.
            layout: that of the matrix, before layers were left out.
        """
        names = self.context.plan.layers
        kept = layout.expand({name: float(name in names) for name in layout.shapes}, matrix) > 0
        return matrix if bool(kept.all()) else matrix[kept][:, kept]


def as_factors(layout: Layout, diagonal: Tensor) -> Factors:
    """Return a diagonal ``(P,)`` as statistics, which is what damping rules look at."""
    blocks = layout.split(diagonal)
    layers = {}
    for name, shape in layout.shapes.items():
        statistics = LayerStatistics.zeros(shape, device=diagonal.device, dtype=diagonal.dtype)
        statistics.squares, statistics.squares_examples = blocks[name].clone(), 1.0
        layers[name] = statistics
    return Factors(layers=layers)
