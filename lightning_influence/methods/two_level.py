"""``auto``: EK-FAC corrected by a coarse space, and by block Krylov steps only where the residual asks for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_influence.layers import LayerGradients
from lightning_influence.methods.base import Gradients, Loader, Method, Solved, register_method
from lightning_influence.methods.closed_form import block_inverse, measured_eigenvalues
from lightning_influence.methods.fitting import fitted_factors, gather
from lightning_influence.passes.curvature import CurvatureProductPass
from lightning_influence.passes.gradients import GradientPass
from lightning_influence.solvers.krylov import block_krylov
from lightning_influence.solvers.scoring import Correction, DenseScorer, PreconditionedScorer
from lightning_influence.solvers.two_level import CoarseSpace, TwoLevel, directions, extended, probes

FIRST_ANCHORS = 256
MOST_ANCHORS = 512
PROBES = 16
_CHECK = 32
_MOST_GROUPS = 4


@register_method("auto")
class Auto(Method):
    """Two-level EK-FAC: factors as preconditioner, a coarse space of training gradients, Krylov steps if needed.

    The coarse space is built in one pass over the curvature examples and kept. Its size starts at
    :data:`FIRST_ANCHORS` and doubles (one more pass over what is new) while the median residual of held-out training
    gradients exceeds the tolerance, as far as the memory budget and :data:`MOST_ANCHORS` allow.
    """

    def prepare(self) -> None:
        """Use or fit the factors; use or build the coarse space."""
        context = self.context
        factors = fitted_factors(context)
        damping = context.resolve_damping(factors, "full")
        self.inverse = block_inverse(context.layout, factors, damping, measured_eigenvalues)
        self._curvature = context.train.sample(context.options.curvature_examples, context.options.seed + 1)
        key = f"{context.weights_key}/{context.train.num_examples}/{factors.origin}"
        if context.state.coarse is None or context.state.coarse_key != key:
            context.state.coarse = self._build()
            context.state.coarse_key = key
        self.space = context.state.coarse
        self.operator = TwoLevel(self.inverse, self.space)
        context.extra["coarse_space"] = self.space.size
        context.extra["curvature_examples"] = self.space.examples

    def solve(self, queries: Gradients) -> Solved:
        """Correct; iterate on the queries if their median residual is above the tolerance."""
        correction, residuals = self.operator.correction(queries)
        groups = self._to_iterate(residuals)
        if groups:
            solutions, residuals = self._iterate(queries, groups)
            return Solved(DenseScorer(self.context.layout.split(solutions)), residuals)
        return Solved(self._scorer(queries, correction), residuals)

    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor | None]:
        """Correct; iterate on the queries if their median residual is above the tolerance."""
        residuals = self.operator.correction(queries)[1]
        groups = self._to_iterate(residuals)
        if groups:
            return self._iterate(queries, groups)
        return self.operator.solve(self.context.layout.dense(queries)[0]), residuals

    def _to_iterate(self, residuals: Tensor) -> list[slice]:
        """Groups of queries to iterate on: none if they are solved well enough, or iterating would take too long."""
        options, median = self.context.options, float(residuals.median())
        if median <= options.tolerance or options.max_steps < 1:
            return []
        groups = self._groups(len(residuals))
        if len(groups) <= _MOST_GROUPS:
            return groups
        self.context.warnings.append(
            f"The median residual {median:.2f} is above the tolerance {options.tolerance:g}; iterating would take "
            f"{len(groups)} groups of queries under the memory budget and was left out. Raise `memory_budget`, or ask "
            "fewer queries at a time."
        )
        return []

    def quadratic(self) -> Callable[[Gradients], Tensor]:
        """EK-FAC's weighted squares plus the correction's products."""
        return lambda gradients: self.operator.quadratic(gradients)[0]

    def _scorer(self, queries: Gradients, correction: Correction) -> PreconditionedScorer:
        tolerance = self.context.options.low_rank_tolerance
        scorer = PreconditionedScorer(self.inverse, queries, correction=correction, tolerance=tolerance)
        if scorer.ranks:
            self.context.extra["low_rank"] = dict(scorer.ranks)
        return scorer

    def _build(self) -> CoarseSpace:
        """The coarse space, grown until held-out gradients are solved well enough."""
        context, layout = self.context, self.context.layout
        limit = max(1, min(MOST_ANCHORS, self._affordable(), context.train.num_examples, layout.numel // 2))
        check = min(_CHECK, context.train.num_examples)
        gradients = self._gradients(context.train.sample(limit + check, context.options.seed + 2))
        total = next(iter(gradients.values())).num_examples
        generator = torch.Generator().manual_seed(context.options.seed + 3)
        order = torch.randperm(total, generator=generator).to(context.device)
        limit = max(1, min(limit, total - 1)) if total > 1 else 1
        held_out = _select(gradients, order[limit : limit + check] if total > 1 else order)
        size, space = 0, None
        while size < limit:
            start, size = size, min(limit, max(FIRST_ANCHORS, 2 * size))
            anchors = _select(gradients, order[start:size])
            space = self._grow(space, anchors)
            residuals = TwoLevel(self.inverse, space).correction(held_out)[1]
            if float(residuals.median()) <= context.options.tolerance:
                break
        assert space is not None
        return space

    def _grow(self, space: CoarseSpace | None, anchors: dict[str, LayerGradients]) -> CoarseSpace:
        """The first coarse space, or a larger one: one pass over the curvature examples for what is new."""
        layout = self.context.layout
        if space is None:
            fresh, mixing = directions(layout, self.inverse, anchors)
            signs = probes(PROBES, layout.numel, fresh)
            products = self._products(torch.cat([fresh, signs]))
            count = len(fresh)
            return CoarseSpace(
                layout,
                fresh,
                products[:count],
                products[count:],
                mixing,
                anchors,
                self.inverse,
                self._examples,
            )
        return extended(space, anchors, self._products)

    def _products(self, vectors: Tensor) -> Tensor:
        """``G V`` over the curvature examples."""
        one_pass = CurvatureProductPass(self.context.plan, vectors, seed=self.context.options.seed)
        self.context.runner.run(one_pass, self._curvature)
        result = one_pass.result(self.context.runner.all_reduce_sum)
        self._examples = one_pass.examples
        if one_pass.estimated:
            note = "The Gauss-Newton matrix was estimated from sampled labels: the loss has too many outputs for all columns."
            if note not in self.context.warnings:
                self.context.warnings.append(note)
        return result

    def _gradients(self, loader: Loader) -> dict[str, LayerGradients]:
        """Loss gradients of a sample of the training data, in random order."""
        one_pass = GradientPass(self.context.plan, description="Influence: anchors")
        self.context.runner.run(one_pass, loader)
        return gather(self.context.runner, one_pass.gradients)

    def _affordable(self) -> int:
        """How many directions the memory budget allows: each is held with its product and its coefficients."""
        each = 3 * self.context.layout.numel * torch.empty((), dtype=self.context.dtype).element_size()
        return max(1, self.context.options.memory_budget // each - PROBES)

    def _groups(self, count: int) -> list[slice]:
        """Runs of queries whose subspaces fit into the memory budget."""
        width = torch.empty((), dtype=self.context.dtype).element_size()
        each = (2 * self.context.options.max_steps + 4) * self.context.layout.numel * width
        size = max(1, self.context.options.memory_budget // each)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _iterate(self, queries: Gradients, groups: list[slice]) -> tuple[Tensor, Tensor]:
        """Block Krylov on each group, starting from the coarse space."""
        context, space = self.context, self.space
        damping = context.layout.expand(self.inverse.damping, space.directions)
        start = (space.directions, space.product + damping * space.directions)
        solutions, residuals, steps = [], [], []
        for group in groups:
            vectors = context.layout.dense({name: layer.select(group) for name, layer in queries.items()})[0]
            result = block_krylov(
                lambda v: self._products(v) + damping * v,
                self.inverse.apply,
                vectors,
                start=start,
                max_steps=context.options.max_steps,
                tolerance=context.options.tolerance,
            )
            solutions.append(result.solutions)
            residuals.append(result.residuals)
            steps.append(result.steps)
        context.extra["krylov_steps"] = steps
        return torch.cat(solutions), torch.cat(residuals)


def _select(gradients: Gradients, index: Tensor) -> dict[str, LayerGradients]:
    return {name: layer.select(index) for name, layer in gradients.items()}
