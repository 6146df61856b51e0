"""``auto``: EK-FAC corrected by a coarse space, and by Krylov steps where the residual asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.curvature.gauss_newton import CurvatureProductPass
from lightning_influence.factors.inverse import BlockInverse
from lightning_influence.layers import LayerGradients
from lightning_influence.methods.base import Gradients, Method, Solved, register_method
from lightning_influence.methods.closed_form import block_inverse, measured_eigenvalues
from lightning_influence.methods.context import Loader, digest
from lightning_influence.methods.fitting import fitted_factors
from lightning_influence.methods.gathering import gather
from lightning_influence.passes.gradients import GradientPass
from lightning_influence.solvers.coarse_space import CoarseSpace, directions, extended, probes
from lightning_influence.solvers.krylov import block_krylov
from lightning_influence.solvers.scoring import Correction, DenseScorer, JointScorer, PreconditionedScorer
from lightning_influence.solvers.two_level import TwoLevel, rescaled

# Of the preconditioned queries' scores: the correction is computed from exact ones.
LOW_RANK_TOLERANCE = 1e-3
FIRST_ANCHORS = 256
MOST_ANCHORS = 512
PROBES = 16
# Where the columns of the output curvature are too many, so many mixtures of them over all examples: about 40
# gradients a direction on the benchmark transformer. With 16 a direction, scores lose .07 of their rank
# correlation with exact ones, with 32 .03 (examples/benchmarks/sketches.py).
MIXTURES = 4096
_FEWEST_MIXTURES, _MOST_MIXTURES = 4, 64
_CHECK = 32
_MOST_GROUPS = 4
_MOST_UNSOLVED = 0.25


@register_method("auto")
class Auto(Method):
    """Two-level EK-FAC: a coarse space of training gradients, Krylov steps where needed.

    The coarse space is built in one pass over the curvature examples and kept. Its size starts at
    :data:`FIRST_ANCHORS` and doubles (one more pass over what is new) while more than a quarter of held-out
    training
    gradients have a residual above the tolerance, as far as the memory budget and :data:`MOST_ANCHORS` allow.
    """

    def prepare(self) -> None:
        """Use or fit the factors; use or build the coarse space."""
        context = self.context
        factors = fitted_factors(context)
        self.mean_weight = factors.mean_weight
        damping = context.resolve_damping(factors, "full")
        self.inverse = block_inverse(context.layout, factors, damping, measured_eigenvalues)
        self._curvature = context.train.sample(context.options.curvature_examples, context.options.seed + 1)
        key = digest(
            context.weights_key,
            context.train.num_examples,
            min(context.options.curvature_examples, context.train.num_examples),
            context.options.seed,
            context.layout.shapes,
            context.dtype,
        )
        if context.state.coarse is None or context.state.coarse_key != key:
            context.state.coarse = self._build()
            context.state.coarse_key = key
        self.space = context.state.coarse.to(context.device)
        self.inverse = self._preconditioner(self.space)
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

    def solve(self, queries: Gradients) -> Solved:
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
            return Solved(iterated, residuals)
        kept = replace(correction, coefficients=correction.coefficients[others])
        return Solved(
            JointScorer([(others, self._scorer(_select(queries, others), kept)), (chosen, iterated)]),
            residuals,
        )

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
        if self.space.mixtures and self.context.options.max_steps is None:
            return chosen[:0]  # a note says so
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

    def _scorer(self, queries: Gradients, correction: Correction) -> PreconditionedScorer:
        asked = self.context.options.low_rank_tolerance
        tolerance = LOW_RANK_TOLERANCE if asked is None else asked
        scorer = PreconditionedScorer(self.inverse, dict(queries), correction=correction, tolerance=tolerance)
        if scorer.ranks:
            self.context.extra["low_rank"] = dict(scorer.ranks)
        return scorer

    def _build(self) -> CoarseSpace:
        """Return the coarse space, grown until held-out gradients are solved well enough."""
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
            residuals = TwoLevel(self._preconditioner(space), space).correction(held_out)[1]
            if float((residuals > self.tolerance).float().mean()) <= _MOST_UNSOLVED:
                break
        assert space is not None
        return space

    def _grow(self, space: CoarseSpace | None, anchors: dict[str, LayerGradients]) -> CoarseSpace:
        """Return the first coarse space, or a larger one, in one pass for what is new."""
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
                self._mixtures() if self._estimated and self._columns is not None else 0,
            )
        return extended(space, anchors, self._products)

    def _products(self, vectors: Tensor) -> Tensor:
        """Return ``G V`` over the curvature examples."""
        one_pass = CurvatureProductPass(
            self.context.plan, vectors, draws=self._mixtures(), seed=self.context.options.seed
        )
        self.context.runner.run(one_pass, self._curvature)
        result = one_pass.result(self.context.runner.all_reduce_sum)
        self._examples = one_pass.examples
        self._columns, self._estimated = one_pass.columns, one_pass.estimated
        return result

    def _preconditioner(self, space: CoarseSpace) -> BlockInverse:
        """Return EK-FAC, rescaled where outputs are many.

        On a character transformer that helps; on the digits MLP it lowers the rank correlation with exact
        scores (.82 to .77 with 256 anchors), although its step is the best in the norm of ``A``.
        """
        return rescaled(self.inverse, space) if space.mixtures else self.inverse

    def _mixtures(self) -> int:
        """Return how many mixtures of columns an example has; all passes of a coarse space need the same."""
        wanted = -(-MIXTURES // max(1, self._curvature.num_examples))
        return min(_MOST_MIXTURES, max(_FEWEST_MIXTURES, wanted))

    def _gradients(self, loader: Loader) -> dict[str, LayerGradients]:
        """Return loss gradients of a sample of the training data."""
        one_pass = GradientPass(self.context.plan, description="Influence: anchors")
        return gather(self.context, one_pass, [loader]).gradients

    def _affordable(self) -> int:
        """Return how many directions fit: each is held with its product and coefficients."""
        each = 3 * self.context.layout.numel * torch.empty((), dtype=self.context.dtype).element_size()
        return max(1, self.context.options.memory_budget // each - PROBES)

    def _group_size(self) -> int:
        """Return how many queries' subspaces fit into the memory budget."""
        width = torch.empty((), dtype=self.context.dtype).element_size()
        each = (2 * self.max_steps + 8) * self.context.layout.numel * width
        return max(1, self.context.options.memory_budget // each)

    def _iterate(self, queries: Gradients) -> tuple[Tensor, Tensor]:
        """Return block Krylov on groups of queries, each starting from the coarse space."""
        context, space = self.context, self.space
        damping = context.layout.expand(self.inverse.damping, space.directions)
        start = (space.directions, space.product + damping * space.directions)
        results = [
            block_krylov(
                lambda v: self._products(v) + damping * v,
                self.inverse.apply,
                vectors,
                start=start,
                max_steps=self.max_steps,
                tolerance=self.tolerance,
            )
            for vectors in torch.split(context.layout.dense(queries)[0], self._group_size())
        ]
        context.extra["krylov_queries"] = sum(len(result.residuals) for result in results)
        context.extra["krylov_steps"] = [result.steps for result in results]
        return torch.cat([result.solutions for result in results]), torch.cat([r.residuals for r in results])


def _select(gradients: Gradients, index: Tensor) -> dict[str, LayerGradients]:
    return {name: layer.select(index) for name, layer in gradients.items()}
