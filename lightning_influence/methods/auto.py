"""``auto``: EK-FAC corrected by a coarse space, and by Krylov steps where the residual asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.two_level import Correction, TwoLevel
from lightning_influence.linalg.block_krylov import Subspace, block_krylov
from lightning_influence.methods.closed_form import block_inverse, measured_eigenvalues
from lightning_influence.methods.coarse_building import CoarseBuilder, vector_bytes
from lightning_influence.methods.context import digest
from lightning_influence.methods.fitting import fitted_factors
from lightning_influence.methods.method import Gradients, Method, Queries, Solved, register_method
from lightning_influence.methods.scorers import DenseScorer, JointScorer, PreconditionedScorer
from lightning_influence.model.gradients import LayerGradients

# Of the preconditioned queries' scores: the correction is computed from exact ones.
LOW_RANK_TOLERANCE = 1e-3
# Measured (examples/benchmarks/krylov.py) after 0, 1, 2 steps on all queries: digits MLP, median
# residual .14, .12, .05, LDS .715, .715, .711; digits CNN, .18, .15, .06, LDS .529, .534, .538. So steps
# are taken above the tolerance of .2 only, and at most three. In groups of 20 the MLP's residuals after
# 1, 2, 3 steps are .14, .08, .05, against .12, .05, .03 together. In float32 its bases stay orthogonal to
# 4e-6 (CNN 7e-6), and eight steps reach a residual of 1e-6 (4e-7 in float64), which changes no LDS.
_MOST_GROUPS = 4


@register_method("auto")
class Auto(Method):
    """Two-level EK-FAC: a coarse space of training gradients, Krylov steps where needed.

    The coarse space is built in one pass over the curvature examples and kept. It starts with 128 anchors
    (:data:`~.coarse_building.FIRST_ANCHORS`), drawn by leverage in a pass of their own. It doubles, in one
    more pass over what is new, while more than a quarter of held-out training gradients have a residual above
    the tolerance, as far as the memory budget and :data:`~.coarse_building.MOST_ANCHORS` allow. Queries are
    answered in groups under what it leaves.
    """

    in_groups: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset({"tolerance", "max_steps"})

    def prepare(self) -> None:
        """Use or fit the factors; use or build the coarse space."""
        context = self.context
        factors = fitted_factors(context)
        self.mean_weight = factors.mean_weight
        damping = context.resolve_damping(factors, "full")
        self.inverse = block_inverse(context.layout, factors, damping, measured_eigenvalues)
        builder = CoarseBuilder(context, self.inverse, self.tolerance)
        key = digest(
            context.weights_key,
            context.train.num_examples,
            min(context.options.curvature_examples, context.train.num_examples),
            context.options.seed,
            context.layout.shapes,
            context.dtype,
        )
        if context.state.coarse is None or context.state.coarse_key != key:
            context.state.coarse = builder.build()
            context.state.coarse_key, context.made = key, True
        else:
            context.reused = True
        self.space = context.state.coarse.to(context.device)
        self._products = builder.products
        self.inverse = builder.preconditioner(self.space)
        self.operator = TwoLevel(self.inverse, self.space)
        context.extra["coarse_space"] = self.space.size
        context.extra["curvature_examples"] = self.space.examples
        if self.space.mixtures:
            context.extra["curvature_mixtures"] = self.space.mixtures
            context.notes.add(
                f"The Gauss-Newton matrix was estimated from {self.space.mixtures} random mixtures of the "
                f"output curvature's columns for each of {self.space.examples} examples: the loss has too "
                "many outputs for all columns. Queries are iterated on, which costs a pass a step, only if "
                "`max_steps` is given."
            )

    def solve(self, queries: Queries) -> Solved:
        """Return corrected answers; iterate on queries whose own residual is above the tolerance."""
        correction, residuals = self.operator.correction(queries)
        chosen = self._to_iterate(residuals)
        if not len(chosen):
            return Solved(self._scorer(queries, correction), residuals)
        solutions, residuals[chosen] = self._iterate(_select(queries, chosen))
        iterated = DenseScorer(self.context.layout.split(solutions))
        rest = torch.ones_like(residuals, dtype=torch.bool)
        rest[chosen] = False
        others = rest.nonzero().flatten()
        if not len(others):
            queries.clear()
            return Solved(iterated, residuals)
        kept = replace(correction, coefficients=correction.coefficients[others])
        left = _select(queries, others)
        queries.clear()
        return Solved(JointScorer([(others, self._scorer(left, kept)), (chosen, iterated)]), residuals)

    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor | None]:
        """Return corrected answers; iterate on queries whose own residual is above the tolerance."""
        residuals = self.operator.correction(queries)[1]
        solutions = self.operator.solve(self.context.layout.dense(queries)[0])
        chosen = self._to_iterate(residuals)
        if len(chosen):
            solutions[chosen], residuals[chosen] = self._iterate(_select(queries, chosen))
        return solutions, residuals

    def _to_iterate(self, residuals: Tensor) -> Tensor:
        """Return queries to iterate on: those above the tolerance, unless they are too many."""
        chosen = (residuals > self.tolerance).nonzero().flatten()
        if self.space.mixtures and not self._may_iterate():
            return chosen[:0]
        groups = -(-len(chosen) // self._group_size())
        if not len(chosen) or (self.max_steps >= 1 and groups <= _MOST_GROUPS):
            return chosen
        self.context.notes.add(
            f"{len(chosen)} of {len(residuals)} queries have a residual above the tolerance "
            f"{self.tolerance:g} (median "
            f"{float(residuals.median()):.2f}). Iterating on them was left out: it would take {groups} "
            "groups of at most "
            f"{_MOST_GROUPS} under the memory budget, with max_steps={self.max_steps}. Raise "
            "`memory_budget` or "
            "`max_steps`, or ask fewer queries at a time."
        )
        return chosen[:0]

    def quadratic(self) -> Callable[[Gradients], Tensor]:
        """Return EK-FAC's weighted squares plus the correction's products."""
        return lambda gradients: self.operator.quadratic(gradients)[0]

    def _scorer(self, queries: Queries, correction: Correction) -> PreconditionedScorer:
        asked = self.context.options.low_rank_tolerance
        tolerance = LOW_RANK_TOLERANCE if asked is None else asked
        scorer = PreconditionedScorer(
            self.inverse, queries, correction=correction, tolerance=tolerance, consume=True
        )
        if scorer.ranks:
            self.context.extra["low_rank"] = dict(scorer.ranks)
        return scorer

    def group_size(self) -> int:
        """Return how many queries to answer at once: what the coarse space leaves of the memory budget.

        A query is held as its gradient and its answer; where it may be iterated on, half is left for that.
        """
        each = 4 if self._may_iterate() else 2
        return max(1, self._left() // (each * vector_bytes(self.context)))

    def _left(self) -> int:
        """Return what the coarse space, with its damped product if that is needed, leaves of the budget."""
        damped = self.space.directions.nbytes if self._may_iterate() else 0
        return self.context.options.memory_budget - self.space.nbytes - damped

    def _may_iterate(self) -> bool:
        """Return whether queries are iterated on: with mixtures only if asked to; a note says so."""
        asked = not self.space.mixtures or self.context.options.max_steps is not None
        return asked and self.max_steps > 0

    def _group_size(self) -> int:
        """Return how many queries' subspaces fit into half of what the coarse space leaves."""
        each = (2 * self.max_steps + 8) * vector_bytes(self.context)
        return max(1, self._left() // (2 * each))

    def _iterate(self, queries: Gradients) -> tuple[Tensor, Tensor]:
        """Return block Krylov on groups of queries, each starting from the coarse space."""
        context, space = self.context, self.space
        damping = context.layout.expand(self.inverse.damping, space.directions)
        start = (space.directions, space.product + damping * space.directions)
        results = [
            block_krylov(
                lambda v: self._products(v)[0].add_(damping * v),
                self.inverse.apply,
                Subspace(vectors, start),
                max_steps=self.max_steps,
                tolerance=self.tolerance,
            )
            for vectors in torch.split(context.layout.dense(queries)[0], self._group_size())
        ]
        extra = context.extra
        extra["krylov_queries"] = extra.get("krylov_queries", 0) + sum(len(r.residuals) for r in results)
        extra["krylov_steps"] = extra.get("krylov_steps", []) + [result.steps for result in results]
        residuals = torch.cat([result.residuals for result in results])
        self._note_unsolved(residuals)
        return torch.cat([result.solutions for result in results]), residuals

    def _note_unsolved(self, residuals: Tensor) -> None:
        """Say so if queries that were iterated on are still above the tolerance."""
        above = int((residuals > self.tolerance).sum())
        if above:
            self.context.notes.add(
                f"{above} of {len(residuals)} queries that were iterated on still have a residual above the "
                f"tolerance {self.tolerance:g} (largest {float(residuals.max()):.2g}). Raise `max_steps` "
                f"(now {self.max_steps}) or the damping."
            )


def _select(gradients: Gradients, index: Tensor) -> dict[str, LayerGradients]:
    return {name: layer.select(index) for name, layer in gradients.items()}
