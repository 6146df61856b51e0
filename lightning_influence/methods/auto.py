"""``auto``: EK-FAC corrected by a coarse space, and by Krylov steps where the residual asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.coarse_space import CoarseSpace
from lightning_influence.curvature.compact_space import CompactSpace
from lightning_influence.curvature.compact_two_level import (
    CompactCorrection,
    CompactTwoLevel,
    list_forms,
    solve_closed,
)
from lightning_influence.curvature.two_level import Correction, TwoLevel
from lightning_influence.linalg.block_krylov import block_krylov
from lightning_influence.linalg.stopping import compute_remainder
from lightning_influence.methods.closed_form import EKFAC, invert_blocks, take_eigenvalues
from lightning_influence.methods.coarse_building import (
    TOLERANCE,
    CoarseBuilder,
    count_vector_bytes,
)
from lightning_influence.methods.compact_building import (
    ROWS_SHARE,
    CompactBuilder,
    Draft,
    choose_builder,
)
from lightning_influence.methods.compact_scorer import CompactScorer
from lightning_influence.methods.context import Context
from lightning_influence.methods.fitting import provide_factors
from lightning_influence.methods.forecast import Forecast
from lightning_influence.methods.gathering import gather_examples
from lightning_influence.methods.long_passes import answer_alone, forecast_auto
from lightning_influence.methods.method import Gradients, Method, Queries, Solved, register_method
from lightning_influence.methods.options import SpaceOptions, require_count, require_number
from lightning_influence.methods.scorers import DenseScorer, JointScorer, PreconditionedScorer
from lightning_influence.methods.scoring_passes import LayeredScorer, Quadratic, SelfScores
from lightning_influence.methods.verifying import verify_answers
from lightning_influence.model.layers.gradients import LayerGradients

# Measured (examples/benchmarks/krylov.py) after 0, 1, 2 steps on all queries: digits MLP, median
# residual .14, .12, .05, LDS .715, .715, .711; digits CNN, .18, .15, .06, LDS .529, .534, .538. So steps
# are taken above the tolerance of .2 only, and at most three. In groups of 20 the MLP's residuals after
# 1, 2, 3 steps are .14, .08, .05, against .12, .05, .03 together. In float32 its bases stay orthogonal to
# 4e-6 (CNN 7e-6), and eight steps reach a residual of 1e-6 (4e-7 in float64), which changes no LDS.
_MAX_STEPS = 3
# Chosen by hand: residuals that are to be below this are rounded by products in float32. One more product
# computes them anew in float64.
_ROUNDED = 1e-2
_MOST_GROUPS = 4
# Chosen by hand: a step takes about four gradients of each curvature example; half a pass over the training
# data is little beside a space for few queries.
_EACH_STEP = 8
# Chosen by hand: see AutoOptions; and the share of the memory budget that answers may take which are formed.
_LOW_RANK, _COMPACT_LOW_RANK = 1e-3, 0.03
_FORMED = 8
_EXAMPLES = "training examples"


@dataclass(frozen=True)
class AutoOptions(SpaceOptions):
    """Options of ``"auto"``.

    Attributes:
        tolerance: relative residual ``||v - (H + damping) x|| / ||v||`` above which a query is iterated on;
            the coarse space grows until most training gradients are below.
        max_steps: most steps of block Krylov. None for 3, and for none where the coarse space is made of
            random mixtures, because a step costs a pass over all columns there.
        low_rank_tolerance: largest relative error, in norm, of the preconditioned queries in low-rank form,
            or of their scores; 0 for exact ones. None for 1e-3, and for 0.03 beside directions of low rank:
            corrections and residuals are computed for what is held there.
    """

    tolerance: float = field(default=TOLERANCE, metadata=require_number())
    max_steps: int | None = field(default=None, metadata=require_count(0))
    low_rank_tolerance: float | None = field(default=None, metadata=require_number(below=1.0))

    @property
    def asks_for_space(self) -> bool:
        """Whether an option is given that nothing but a correction uses."""
        return (self.curvature_examples, self.max_steps, self.tolerance) != (None, None, TOLERANCE)


@register_method("auto", options=AutoOptions)
class Auto(Method):
    """Two-level EK-FAC: a coarse space of training gradients, Krylov steps where needed.

    The coarse space is built in one pass over the curvature examples and kept. It starts with 128 anchors
    (:data:`~.coarse_building.FIRST_ANCHORS`), drawn by leverage in a pass of their own. It doubles, in one
    more pass over what is new, while more than a quarter of held-out training gradients have a residual above
    the tolerance, as far as the memory budget and :data:`~.coarse_building.MOST_ANCHORS` allow. Queries are
    answered in groups under what it leaves.

    An answer whose residual is above that of ``"ekfac"``'s answer, or above 1, that of an answer of zero, is
    not given: ``"ekfac"``'s takes its place, with a note. Residuals in a system that is estimated from random
    mixtures do not tell enough; :mod:`~.compact_ways` says what does. Where passes are long and outputs too
    many to take the curvature of all, as in language models, ``"ekfac"`` answers from the first, unless an
    option asks for a correction.
    """

    in_groups: ClassVar[bool] = True
    options: AutoOptions

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._replaced = 0  # training examples that got EK-FAC's answer, on this process
        self._draft: Draft | None = None  # of a compact space that the first queries complete
        self._alone: EKFAC | None = None
        self.builder: CoarseBuilder | CompactBuilder
        self.operator: TwoLevel | CompactTwoLevel
        self.space: CoarseSpace | CompactSpace

    @property
    def whole_gauss_newton(self) -> bool:
        """Whether the system is the Gauss-Newton matrix of all layers together."""
        return True

    @property
    def answering(self) -> Method:
        """EK-FAC, if it answers alone."""
        return self._alone or self

    def forecast(self, told: Forecast, queries: int) -> bool:
        """Add the passes that fit factors and build the coarse space, and those of groups of queries."""
        forecast_auto(self.context, told, queries, asked=self.options.asks_for_space)
        return True

    def prepare(self) -> None:
        """Use or fit the factors; use, grow or build the coarse space."""
        builder = self._prepare_factors()
        if self._alone is None:
            self._use(choose_builder(builder))

    def prepare_to_solve(self, queries: int) -> None:
        """Do the same, but complete a new compact space in the pass that the first queries take."""
        plain, few = self._prepare_factors(), queries if self.options.curvature_examples is None else None
        if self._alone is not None:
            return
        builder = choose_builder(plain, few)
        if isinstance(builder, CompactBuilder) and builder.known is None:
            self.builder, self.inverse, self._draft = builder, builder.inverse, builder.draft()
        else:
            self._use(builder)

    def prepare_self(self) -> None:
        """Use or fit the factors; use, grow or build the dense coarse space.

        With a compact space every group of training examples would take a pass over all of them: the dense
        one takes its place, of as many directions as fit.
        """
        builder = self._prepare_factors()
        if self._alone is None:
            self._use(builder)

    def _prepare_factors(self) -> CoarseBuilder:
        """Use or fit the factors, and return the builder of the dense space; EK-FAC may answer alone."""
        context, options, state = self.context, self.options, self.context.state
        factors = provide_factors(context)
        self.mean_weight = factors.mean_weight
        closed = context.resolve_damping(factors, "closed")
        budget = options.memory_budget
        self.ekfac = invert_blocks(context.layout, factors, closed, take_eigenvalues, budget)
        damping = context.resolve_damping(factors, "full")
        inverse = invert_blocks(context.layout, factors, damping, take_eigenvalues, budget)
        builder = CoarseBuilder(context, inverse, options.most_curvature_examples, options.tolerance)
        if builder.key not in (state.coarse_key, state.compact_key) and not options.asks_for_space:
            self._alone = answer_alone(context, factors, self.ekfac, options.low_rank_tolerance)
        return builder

    def _use(self, builder: CoarseBuilder | CompactBuilder) -> None:
        """Find a coarse space and set up the operator that corrects with it."""
        self.builder = builder
        self._correct_with(builder.set_up())

    def _correct_with(self, operator: TwoLevel | CompactTwoLevel) -> None:
        """Take what corrects with a coarse space, and say what it is made of."""
        self.operator, self.space, context = operator, operator.space, self.context
        self.inverse = operator.inverse
        if self.space.mixtures:
            context.notes.add(
                f"The Gauss-Newton matrix was estimated from {self.space.mixtures} random mixtures of the "
                f"output curvature's columns for each of {self.space.examples} examples: the loss has too "
                "many outputs for all columns. Queries are iterated on, which costs a pass a step, only if "
                "`max_steps` is given."
            )

    def solve(self, queries: Queries) -> Solved:
        """Return corrected answers; iterate on queries whose own residual is above the tolerance."""
        if self.builder.is_small:
            solutions, told = self.solutions(queries)
            queries.clear()
            return Solved(DenseScorer(self.context.layout.split(solutions)), told)
        correction, residuals, own = self._compare(queries)
        chosen, solutions = self._improve(queries, residuals)
        worse = self._find_worse(residuals, own, "queries")
        residuals = torch.where(worse, own, residuals)
        parts: list[tuple[Tensor, LayeredScorer]] = []
        kept = ~worse[chosen]
        if bool(kept.any()):
            parts.append((chosen[kept], DenseScorer(self.context.layout.split(solutions[kept]))))
        rest = ~worse
        rest[chosen] = False
        everyone = len(residuals)
        for positions, falls_back in ((rest.nonzero().flatten(), False), (worse.nonzero().flatten(), True)):
            if not len(positions):
                continue
            # A scorer keeps what it is given: all queries as they are, or copies of some.
            own_queries = dict(queries) if len(positions) == everyone else _select(queries, positions)
            few = None if falls_back else correction.select(positions)
            parts.append((positions, self._score(own_queries, few)))
        queries.clear()
        return Solved(parts[0][1] if len(parts) == 1 else JointScorer(parts), residuals)

    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor | None]:
        """Return corrected answers; iterate on queries whose own residual is above the tolerance."""
        correction, residuals, own = self._compare(queries)
        vectors = self.context.layout.dense(queries)[0]
        if isinstance(correction, CompactCorrection):
            solutions = correction.solutions()
        else:
            solutions = correction.add_to(self.inverse.apply(vectors))
        chosen, found = self._improve(queries, residuals)
        solutions[chosen] = found
        worse = self._find_worse(residuals, own, "queries")
        if bool(worse.any()):
            solutions[worse] = self.ekfac.apply(vectors[worse])
        residuals = torch.where(worse, own, residuals)
        builder, left = self.builder, (~worse).nonzero().flatten()
        if isinstance(builder, CompactBuilder) and builder.is_small and len(left):
            known = self.space.rows.indices if isinstance(self.space, CompactSpace) else left[:0]
            rights, plain = vectors[left], self.ekfac.apply(vectors[left])
            curved, others = builder.measure_curved(torch.cat([solutions[left], plain]), known)
            verified = verify_answers(rights, solutions[left], plain, curved, others)
            solutions[left] = verified.choose(solutions[left], plain)
            residuals[left] = verified.bound(residuals[left], own[left])
            self.context.extra["verified_on"] = others
            if told := verified.describe(others):
                self.context.notes.add(told)
        return solutions, residuals

    def _improve(self, queries: Gradients, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Iterate on queries whose residual is above the tolerance.

        Args:
            queries: query gradients, ``K = 1``.
            residuals: of their corrected answers, ``(Q,)``; lowered in place.

        Returns:
            Positions of those that have a better answer now, ``(V,)``, and these answers ``(V, P)``.
        """
        chosen = self._choose(residuals, "queries")
        if not len(chosen):
            return chosen, self.context.layout.dense(_select(queries, chosen))[0]
        solutions, found = self._iterate(_select(queries, chosen), "queries")
        better = found < residuals[chosen]
        residuals[chosen[better]] = found[better]
        return chosen[better], solutions[better]

    def quadratic(self) -> Quadratic:
        """Return EK-FAC's weighted squares plus the correction's products, with the residuals."""
        operator = self.operator
        assert isinstance(operator, TwoLevel)

        def quadratic(gradients: Gradients) -> tuple[Tensor, Tensor]:
            values = operator.quadratic(gradients)[0]
            residuals = operator.correction(gradients)[1]
            own = operator.estimate_residuals(self.ekfac, gradients)
            worse = residuals > own.clamp(max=1.0)
            if bool(worse.any()):
                self._replaced += int(worse.sum())
                values = torch.where(worse, self.ekfac.quadratic(gradients)[0], values)
            return values, torch.where(worse, own, residuals)

        return quadratic

    def refine(self, scores: SelfScores) -> SelfScores:
        """Iterate on training examples whose residual is above the tolerance, unless they are too many.

        Args:
            scores: what :meth:`quadratic` gave, of all processes.

        Returns:
            The scores, with smaller residuals where iterating helped.
        """
        assert scores.residuals is not None
        values, residuals = scores.values.clone(), scores.residuals.clone()
        chosen = self._choose(residuals, _EXAMPLES)
        replaced = int(self.context.runner.all_reduce_sum(torch.tensor(float(self._replaced))))
        if not len(chosen):  # those that are iterated on keep no answer of EK-FAC's
            self._note_worse(replaced, _EXAMPLES)
        for group in torch.split(chosen, self._group_size()) if len(chosen) else ():
            own, name = scores.indices[group], "Influence: unsolved examples"
            gradients = gather_examples(self.context, self.context.train, own, name, in_batches=True)
            solutions, found = self._iterate(gradients, _EXAMPLES)
            better = (found < residuals[group].to(found)).cpu()
            products = (solutions * self.context.layout.dense(gradients)[0]).sum(dim=1)
            values[group[better]] = products.cpu().to(values)[better]
            residuals[group[better]] = found.cpu().to(residuals)[better]
        return SelfScores(scores.indices, values, residuals)

    def _compare(self, queries: Gradients) -> tuple[Correction | CompactCorrection, Tensor, Tensor]:
        """Return corrections, their residuals, and those of EK-FAC's own answers in the same system."""
        builder = self.builder
        if not isinstance(builder, CompactBuilder):
            operator = self.operator
            assert isinstance(operator, TwoLevel)
            return *operator.correction(queries), operator.estimate_residuals(self.ekfac, queries)
        forms = list_forms(self.inverse, self.ekfac)
        answers, rows = solve_closed(forms, queries, self._low_rank(), self.context.dtype), None
        if self._draft is not None:
            operator, rows = builder.finish(self._draft, answers.vectors)
            self._correct_with(operator)
            self._draft = None
        assert isinstance(self.operator, CompactTwoLevel)
        found = self.operator.compare(queries, answers, rows)
        if found[0].shortened:
            self.context.notes.add(
                f"{found[0].shortened} queries are far from solved by {self.space.size} directions: their "
                "answers were shortened until their residuals were below 1, so that the order of scores "
                "tells more than their size. Raise `memory_budget`, `max_steps` or the damping."
            )
        if found[0].alone:
            self.context.notes.add(
                f"{found[0].alone} queries got the answer of method='ekfac' in its best length: nothing that "
                f"{self.space.size} directions make of it is better. Raise `memory_budget`."
            )
        return found

    def _find_worse(self, residuals: Tensor, own: Tensor, subject: str) -> Tensor:
        """Return which residuals are above EK-FAC's own or above 1, and say so."""
        worse = residuals > own.clamp(max=1.0)
        self._note_worse(int(worse.sum()), subject)
        return worse

    def _note_worse(self, count: int, subject: str) -> None:
        """Say so if answers of EK-FAC had to take the place of corrected ones."""
        if count:
            self.context.notes.add(
                f"{count} {subject} got the answer of method='ekfac': what a coarse space of "
                f"{self.space.size} directions makes of it has a residual above that of EK-FAC's own answer, "
                "or above 1, that of no answer at all. Raise `memory_budget`, `max_steps` or the damping."
            )

    def _choose(self, residuals: Tensor, subject: str) -> Tensor:
        """Return what to iterate on: all that is above the tolerance, unless it is too much."""
        tolerance = self.options.tolerance
        chosen = (residuals > tolerance).nonzero().flatten()
        if not len(chosen) or (self.space.mixtures and not self._may_iterate()):
            return chosen[:0]
        groups = -(-len(chosen) // self._group_size())
        if self._steps() >= 1 and groups <= _MOST_GROUPS:
            return chosen
        advice = "Raise `memory_budget` or `max_steps`, or ask fewer queries at a time."
        if self.builder.is_small:
            advice = (
                "The coarse space was made small because queries are few: `curvature_examples=4096` asks for "
                "as large a one as many queries get, and `max_steps=3` for iterating."
            )
        self.context.notes.add(
            f"{len(chosen)} of {len(residuals)} {subject} have a residual above the tolerance "
            f"{tolerance:g} (median {float(residuals.median()):.2f}). Iterating on them was left out: it "
            f"would take {groups} groups of at most {_MOST_GROUPS} under the memory budget, with "
            f"max_steps={self._steps()}. {advice}"
        )
        return chosen[:0]

    def _score(self, queries: Queries, correction: Correction | CompactCorrection | None) -> LayeredScorer:
        """Return the scorer of corrected queries, or of EK-FAC's answers if there is no correction."""
        if isinstance(correction, CompactCorrection):
            return CompactScorer(correction, self.options.memory_budget // _FORMED)
        scorer = PreconditionedScorer(
            self.ekfac if correction is None else self.inverse,
            queries,
            correction=correction,
            tolerance=self._low_rank(),
            consume=True,
            held_bytes=self.options.memory_budget // 4,
        )
        if scorer.ranks:
            self.context.extra["low_rank"] = dict(scorer.ranks)
        return scorer

    def _low_rank(self) -> float:
        """Return the error that low-rank forms of preconditioned queries may make."""
        given = self.options.low_rank_tolerance
        default = _COMPACT_LOW_RANK if isinstance(self.builder, CompactBuilder) else _LOW_RANK
        return default if given is None else given

    def group_size(self) -> int:
        """Return how many queries to answer at once: what the coarse space leaves of the memory budget.

        A query is held as its gradient and its answer; where it may be iterated on, half is left. Beside a
        compact space, see :meth:`.CompactBuilder.count_query_bytes`.
        """
        if isinstance(self.builder, CompactBuilder) and not self.builder.is_small:
            return max(1, self._left() // self.builder.count_query_bytes(self._low_rank() > 0))
        each = 6 if self.builder.is_small else 4 if self._may_iterate() else 2
        return max(1, self._left() // (each * count_vector_bytes(self.context)))

    @property
    def compresses(self) -> bool:
        """Whether answers are held in low rank, as those beside a compact space are."""
        compact = isinstance(self.builder, CompactBuilder) and not self.builder.is_small
        return compact and self._low_rank() > 0

    def measure_group_size(self, queries: Queries) -> int:
        """Return how many queries fit beside a compact space in the form in which they are held."""
        gradients = list(queries.values())
        if not isinstance(self.builder, CompactBuilder) or not gradients:
            return self.group_size()
        forms = list_forms(self.inverse, self.ekfac)
        answers = solve_closed(forms, queries, self._low_rank(), self.context.dtype)
        held = answers.nbytes * (len(forms) + 1) // len(forms)  # of all forms, and the chosen ones
        held += sum(layer.nbytes for layer in gradients)
        each = torch.tensor([held / max(1, gradients[0].num_examples)], dtype=torch.float64)
        most = float(self.context.runner.all_gather_cat(each).max())
        left = self._left() - self.options.memory_budget // ROWS_SHARE  # of which scores take a part
        return max(self.group_size(), int(left / max(1.0, most)))

    def _left(self) -> int:
        """Return what the coarse space, with its damped product if that is needed, leaves of the budget."""
        if self._draft is not None:
            return self.options.memory_budget - self._draft.nbytes
        space, damped = self.space, 0
        if isinstance(space, CoarseSpace) and self._may_iterate():
            damped = space.directions.nbytes
        return self.options.memory_budget - space.nbytes - damped

    def _steps(self) -> int:
        """Return the most steps of block Krylov: beside a small space as many as cost little beside it."""
        if self.options.max_steps is not None:
            return self.options.max_steps
        if not self.builder.is_small:
            return _MAX_STEPS
        return min(_MAX_STEPS, self.context.train.num_examples // (_EACH_STEP * self.space.examples))

    def _may_iterate(self) -> bool:
        """Return whether queries are iterated on: with mixtures only if asked to; a note says so."""
        asked = not self.space.mixtures or self.options.max_steps is not None
        return asked and self._steps() > 0

    def _group_size(self) -> int:
        """Return how many queries' subspaces fit into half of what the coarse space leaves."""
        each = (2 * self._steps() + 8) * count_vector_bytes(self.context)
        return max(1, self._left() // (2 * each))

    def _iterate(self, queries: Gradients, subject: str) -> tuple[Tensor, Tensor]:
        """Return block Krylov on groups of queries, each starting from the coarse space."""
        context = self.context
        like = torch.empty(0, device=context.device, dtype=context.dtype)
        damping = context.layout.expand(self.inverse.damping, like)

        def product(vectors: Tensor) -> Tensor:
            return self.builder.multiply(vectors).add_(damping.to(vectors.dtype) * vectors)

        results = []
        for vectors in torch.split(context.layout.dense(queries)[0], self._group_size()):
            result = block_krylov(
                product,
                self.inverse.apply,
                self.operator.begin(vectors),
                max_steps=self._steps(),
                tolerance=self.options.tolerance,
                shorten=True,
            )
            if self.options.tolerance < _ROUNDED and vectors.dtype != torch.float64:
                remainder = compute_remainder(product, vectors, result.solutions)
                norms = vectors.double().norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
                result = replace(result, residuals=(remainder.norm(dim=1) / norms).to(vectors.dtype))
            results.append(result)
        extra = context.extra
        extra["krylov_queries"] = extra.get("krylov_queries", 0) + sum(len(r.residuals) for r in results)
        extra["krylov_steps"] = extra.get("krylov_steps", []) + [result.steps for result in results]
        residuals = torch.cat([result.residuals for result in results])
        self._note_unsolved(residuals, subject)
        return torch.cat([result.solutions for result in results]), residuals

    def _note_unsolved(self, residuals: Tensor, subject: str) -> None:
        """Say so if queries that were iterated on are still above the tolerance."""
        above = int((residuals > self.options.tolerance).sum())
        if above:
            self.context.notes.add(
                f"{above} of {len(residuals)} {subject} that were iterated on still have a residual above "
                f"the tolerance {self.options.tolerance:g} (largest {float(residuals.max()):.2g}). Raise "
                f"`max_steps` (now {self._steps()}) or the damping."
            )


def _select(gradients: Mapping[str, LayerGradients], index: Tensor) -> dict[str, LayerGradients]:
    return {name: layer.select(index) for name, layer in gradients.items()}
