"""The coarse space in little memory: how many directions of which rank, and the passes that make them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.compact_solving import solve_in_rank
from lightning_influence.curvature.compact_space import CompactSpace, CurvatureRows
from lightning_influence.curvature.compact_two_level import CompactTwoLevel, compute_best_step
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.low_rank_matrices import (
    DenseMatrices,
    Matrices,
    compress,
    count_numbers,
    draw_rank_one,
    join_matrices,
    make_matrices,
)
from lightning_influence.curvature.row_passes import CombinationPass, RowsPass
from lightning_influence.methods.coarse_building import (
    MOST_ANCHORS,
    MOST_COLUMNS,
    CoarseBuilder,
    SpaceBuilder,
    count_vector_bytes,
)
from lightning_influence.methods.context import Context
from lightning_influence.methods.forecast import ANSWER_RANK, is_long
from lightning_influence.methods.gathering import differentiate
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.layer import ParameterRule
from lightning_influence.model.layers.plan import LayerPlan

# Ranks to cut directions to, best first: the first with which all of them fit. Measured on the digits MLP and
# CNN: with rank 4 the correlation with retraining is that of whole directions, with rank 1 nearly so.
RANKS = (4, 2, 1)
# Chosen by hand: residuals are priced to a relative error of about sqrt(1 / 128), a tenth; of twice that at
# most where a quarter of the space's memory has no room for more.
PROBES, _FEWEST_PROBES = 64, 16
_PROBE_SEED = 20_240_602
# Chosen by hand: the share of the memory budget that the space may take; queries need the rest.
_SHARE = 2
#: The share that output gradients may take while curvature rows are found.
ROWS_SHARE = 4
# Where this many times as many directions fit as in dense form, they are held compactly.
_WORTH = 2
# Stages to divide layers into. On a ResNet-18 (300 images, damping .003), where EK-FAC's residuals are
# 400 to 1,400: with 100 directions of rank 1 they are 13 to 36 in one stage, 5 to 11 in two, 2.3 to 6.5 in
# four, 1.4 to 3.1 in 16; with 25 directions 82 to 146, 57 to 61, 26 to 48, 12 to 18. So four times as many
# stages are worth about twice as many directions. Rank 4 makes 12 to 35, 2.1 to 4.9, 1.4 to 2.8 of it.
STAGES = (16, 8, 4, 2, 1)
_STAGED, _RANKED = 0.5, 0.1
# Chosen by hand: parts of directions that may span the space, whose Galerkin matrix is factorised; and ranks
# of all directions together, by which the cost of products with them grows.
_MOST_PARTS, _MOST_RANKS = 2048, 1024


# A space for few queries: anchors of each, and curvature examples of each as a share of the training data, at
# least so many, so that building it takes about as long as two passes over them. On a ViT of 1.2 M (384
# examples, the mean of 8 queries, damping .003) scores have a rank correlation of .23 with converged ones by
# EK-FAC; of .53 with 64 directions, from 96 examples or in 8 plain epochs; of .70 with 256 from all in 44.
_ANCHORS_EACH, _EXAMPLES_SHARE, _FEWEST_EXAMPLES = 64, 8, 64
# Chosen by hand: its answers are verified on half as many other examples as it is made of.
_OTHERS_SHARE = 2


@dataclass(frozen=True)
class Plan:
    """What a compact space is made of.

    Attributes:
        rank: of the directions in a layer.
        stages: how many stages have directions of their own.
        count: of directions.
        probes: how many.
        row_bytes: what the curvature rows of one direction take in one stage.
    """

    rank: int
    stages: int
    count: int
    probes: int
    row_bytes: int

    @property
    def worth(self) -> float:
        """How much such a space is worth, in numbers that mean something beside one another only."""
        return float(self.count * self.stages**_STAGED * self.rank**_RANKED)


@dataclass(frozen=True)
class Draft:
    """A compact space without its curvature rows.

    Attributes:
        plan: what it was made by.
        directions: by layer.
        probes: by layer.
        row_bytes: what its rows are going to take.
    """

    plan: Plan
    directions: Mapping[str, Matrices]
    probes: Mapping[str, Matrices]
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Memory that the space is going to hold, in bytes."""
        vectors = [*self.directions.values(), *self.probes.values()]
        return self.row_bytes + sum(part.nbytes for part in vectors)


def divide_layers(names: Sequence[str], count: int) -> dict[str, int]:
    """Return the stage of each layer: consecutive layers, about as many in each stage."""
    return {name: number * count // len(names) for number, name in enumerate(names)}


class AnchorPass:
    """Finds ``P^{-1} g`` of some examples, cut to a low rank.

    Args:
        plan: the covered layers.
        inverse: ``P^{-1}``.
        rank: of what is kept in a layer, at most.
        only: dataset indices of the examples, ``(M,)``.
        dtype: precision of what is kept.
    """

    description = "Influence: anchors"

    def __init__(
        self, plan: LayerPlan, inverse: BlockInverse, rank: int, only: Tensor, dtype: torch.dtype
    ) -> None:
        self.forward, self._inverse, self._rank, self._only = Forward(plan), inverse, rank, only
        self._dtype = dtype
        self._parts: dict[str, list[Matrices]] = {name: [] for name in inverse.layers}
        self._indices: list[Tensor] = []

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Keep those of one batch."""
        rows = torch.isin(indices, self._only).nonzero().flatten()
        if not len(rows):
            return
        gradients = differentiate(self.forward, module, batch, indices, None)
        for name, inverse in self._inverse.layers.items():
            if name in gradients:
                few = gradients[name].select(rows.to(inverse.eigenvalues.device))
                found = solve_in_rank(inverse, few, self._rank, self._dtype)
            else:
                nothing = inverse.eigenvalues.new_zeros(len(rows), *inverse.eigenvalues.shape)
                found = compress(nothing.to(self._dtype), self._rank)
            self._parts[name].append(found)
        self._indices.append(indices[rows].cpu())

    def collect(self, runner: Any) -> dict[str, Matrices]:
        """Return what all processes have found by layer, in the order in which the examples were chosen."""
        indices = runner.all_gather_cat(torch.cat([torch.zeros(0, dtype=torch.int64), *self._indices]))
        order = indices.argsort()
        order = order[torch.searchsorted(indices[order], self._only)]
        found = {}
        for name, inverse in self._inverse.layers.items():
            weights = inverse.eigenvalues
            nothing = compress(weights.new_zeros(0, *weights.shape, dtype=self._dtype), self._rank)
            tensors = join_matrices([nothing, *self._parts.pop(name)]).tensors()
            rows = order.to(weights.device)
            found[name] = make_matrices({
                key: runner.all_gather_cat(tensor)[rows] for key, tensor in tensors.items()
            })
        return found


class CompactBuilder(SpaceBuilder):
    """Finds the compact coarse space of the context's model: the kept one, grown if need be, or a new one.

    All anchors that there is room for are taken at once: products with directions of low rank cost little
    beside the backward passes that they share.
    """

    @property
    def known(self) -> CompactSpace | None:
        """The space that an earlier call has kept."""
        state = self.context.state
        return state.compact if state.compact_key == self.key else None

    def set_up(self) -> CompactTwoLevel:
        """Find the space, and return what corrects with it; a kept one grows if there is room for more."""
        context, state, known = self.context, self.context.state, self.known
        context.reused |= known is not None
        if known is None or self.count_affordable(known) > max(known.limit, known.size):
            grown = self._build(None if known is None else known.to(context.device))
            context.made |= known is None or grown.size > known.size
            state.compact, state.compact_key = grown, self.key
        assert state.compact is not None
        return self._correct(state.compact.to(context.device))

    def draft(self, space: CompactSpace | None = None) -> Draft:
        """Choose as many anchors as fit, or those that are not in a space yet, and find their directions.

        Args:
            space: what there is already, made of the first anchors in the same order.

        Returns:
            What :meth:`finish` completes, if there is no space yet.
        """
        context, inverse = self.context, self.inverse if space is None else space.inverse
        sample = self._sample(self._wanted())
        found, plan = self._weigh(sample, inverse), self._choose(space)
        size, most = 0 if space is None else space.size, min(plan.count, sample.num_examples)
        chosen = self._draw(found, max(size, most))[size:most]
        anchors = AnchorPass(context.plan, inverse, plan.rank, chosen, context.dtype)
        context.runner.run(anchors, sample.holding(chosen))
        directions = anchors.collect(context.runner)
        like = torch.empty(0, device=context.device, dtype=context.dtype)
        probes = draw_rank_one(context.layout.shapes, plan.probes, _PROBE_SEED, like)
        rows = plan.row_bytes * (plan.probes + plan.stages * (most - size))
        return Draft(plan, directions, probes, rows)

    def finish(self, draft: Draft, vectors: Mapping[str, Matrices]) -> tuple[CompactTwoLevel, CurvatureRows]:
        """Complete a space, and keep it, in a pass that finds the rows of further vectors as well.

        Args:
            draft: from :meth:`draft`.
            vectors: by layer, such as closed-form answers.

        Returns:
            What corrects with the space, and the vectors' rows ``B^T J V`` of this process's examples.
        """
        context, state = self.context, self.context.state
        space, rows = self._complete(draft, vectors)
        context.made = True
        state.compact, state.compact_key = space, self.key
        return self._correct(space), rows

    def _correct(self, space: CompactSpace) -> CompactTwoLevel:
        """Return what corrects with a space; the preconditioner is rescaled as for the dense one."""
        context, draws, like = self.context, self._mixtures(), space.rows.values
        runner, extra = context.runner, context.extra
        extra["coarse_rank"], extra["coarse_stages"] = space.rank, space.num_stages
        self._tell(space)

        def find_rows(vectors: Mapping[str, Matrices]) -> CurvatureRows:
            return self._run_rows([vectors]).rows(like)

        def combine(rows: CurvatureRows) -> Tensor:
            one_pass = CombinationPass(context.plan, rows, draws=draws, seed=self._seed)
            runner.run(one_pass, self._curvature)
            return one_pass.result(runner.all_reduce_sum)

        step = compute_best_step(self.inverse, space) if space.mixtures else 1.0
        return CompactTwoLevel(self.inverse, space, find_rows, combine, runner.all_reduce_sum, step)

    def look(self) -> None:
        """Find the leverages, in the pass that shows how many columns the output curvature has, once."""
        if self.key not in self.context.state.columns:
            self._weigh(self._sample(self._wanted()), self.inverse)

    def may_help(self, dense: int) -> bool:
        """Return whether far more directions than so many dense ones could fit, outputs being few."""
        return self._plan(min(RANKS), 1, None, 1).count >= _WORTH * dense

    def count_affordable(self, known: CompactSpace | None = None) -> int:
        """Return how many directions fit, by what is known of the outputs."""
        return self._choose(known).count

    def count_query_bytes(self, low_rank: bool) -> int:
        """Return about what a query takes while it is answered, in bytes.

        It is held as its gradient and as both closed forms' answers, which are of low rank where these take
        less; and products with the probes and the directions are found for all of them.

        Args:
            low_rank: whether answers may be cut.
        """
        context = self.context
        if not low_rank or context.state.factors is None:
            return 8 * count_vector_bytes(context)
        total = 0
        for name, (groups, d_out, d_in) in context.layout.shapes.items():
            positions, pair = _count_positions(context, name), d_out + d_in
            gradient, answer = (min(d_out * d_in, count * pair) for count in (positions, ANSWER_RANK))
            total += groups * int(gradient + 4 * answer)
        return count_vector_bytes(context) * total // context.layout.numel + 1

    def _choose(self, known: CompactSpace | None) -> Plan:
        """Return the directions that are worth most of those that fit, or more of those that are known."""
        if known is not None:
            return self._plan(known.rank, known.num_stages, known)
        layers = len(self.context.layout.shapes)
        plans = [self._plan(rank, min(stages, layers)) for rank in RANKS for stages in STAGES]
        return max(plans, key=lambda plan: plan.worth)  # the first of equal ones

    def _plan(self, rank: int, stages: int, known: CompactSpace | None = None, columns: int = 0) -> Plan:
        """Return how many directions of a rank, told apart in so many stages, fit beside probes.

        Args:
            rank: of the directions.
            stages: into which their layers are divided.
            known: a space that is to grow.
            columns: of the output curvature of an example; what is known of it if 0.
        """
        context = self.context
        width = torch.empty((), dtype=context.dtype).element_size()
        draws = self._mixtures()
        columns = columns or self.context.state.columns.get(self.key, 0) or MOST_COLUMNS
        if known is not None:
            columns = known.rows.values.shape[1]
        elif columns > max(MOST_COLUMNS, draws):
            columns = draws
        numbers = columns * self._curvature.num_examples
        shapes = context.layout.shapes.values()
        each = width * (stages * numbers + sum(count_numbers(shape, rank) for shape in shapes))
        probe = width * (numbers + sum(groups * (d_out + d_in) for groups, d_out, d_in in shapes))
        room = context.options.memory_budget // _SHARE
        probes = max(_FEWEST_PROBES, min(PROBES, room // (4 * probe)))
        if known is not None:
            probes = known.num_probes
        most = max(1, min(self._wanted(), _MOST_PARTS // stages, _MOST_RANKS // rank))
        count = max(1, min(most, (room - probes * probe) // each))
        return Plan(rank, stages, count, probes, width * numbers)

    def _complete(
        self, draft: Draft, vectors: Mapping[str, Matrices] | None = None
    ) -> tuple[CompactSpace, CurvatureRows]:
        """Find the rows of a draft's directions, and of further vectors, and make a space of the former."""
        context, plan = self.context, draft.plan
        like = torch.empty(0, device=context.device, dtype=context.dtype)
        gather = context.runner.all_gather_cat if context.runner.world_size > 1 else None
        stages = divide_layers(list(context.layout.shapes), plan.stages)
        extra = [] if vectors is None else [vectors]
        one_pass = self._run_rows([*extra, draft.probes, draft.directions], stages)
        one_pass.count.reduce(context.runner.all_reduce_sum)
        mixtures = self._mixtures() if one_pass.estimated and one_pass.columns is not None else 0
        own = one_pass.rows(like, blocks=slice(len(extra)), keep=True)
        rows = one_pass.rows(like, gather, blocks=slice(len(extra), None))
        space = CompactSpace(
            context.layout,
            draft.directions,
            draft.probes,
            rows,
            one_pass.count.normaliser,
            self.inverse,
            mixtures,
            plan.rank,
            plan.count,
            stages,
        )
        return space, own

    def _build(self, space: CompactSpace | None) -> CompactSpace:
        """Return the space with as many anchors as fit: a new one, or the given one grown."""
        if space is None:
            return self._complete(self.draft())[0]
        limit = self._choose(space).count
        if space.size >= min(limit, self._sample(self._wanted()).num_examples):
            return replace(space, limit=limit)
        context, directions = self.context, self.draft(space).directions
        like = torch.empty(0, device=context.device, dtype=context.dtype)
        gather = context.runner.all_gather_cat if context.runner.world_size > 1 else None
        grown = space.grown(directions, self._run_rows([directions], space.stages).rows(like, gather))
        return replace(grown, limit=limit)

    def measure_curved(self, vectors: Tensor, known: Tensor) -> tuple[Tensor, int]:
        """Return ``v^T A v`` over other examples than a space is made of, in a pass of their own.

        Args:
            vectors: flat, ``(V, P)``.
            known: dataset indices of the space's examples, of all processes.

        Returns:
            ``(V,)`` in float64, and of how many examples.
        """
        context, total = self.context, self.context.train.num_examples
        wanted = max(_FEWEST_EXAMPLES, self.most_examples // _OTHERS_SHARE)
        sample = context.train.sample(-(-wanted * total // max(1, total - len(known))), self._seed + 4)
        blocks = {name: DenseMatrices(part) for name, part in context.layout.split(vectors).items()}
        one_pass = RowsPass(context.plan, blocks, draws=self._mixtures(), seed=self._seed)
        context.runner.run(one_pass, sample)
        one_pass.count.reduce(context.runner.all_reduce_sum)
        rows = one_pass.rows(vectors)
        others = ~torch.isin(rows.indices, known)
        squares = rows.values[others.to(vectors.device)].double().square().sum(dim=(0, 1))
        counted = context.runner.all_reduce_sum(torch.tensor([float(others.sum())]))
        examples = int(counted)
        normaliser = one_pass.count.normaliser * examples / max(1, one_pass.count.examples)
        curved = context.runner.all_reduce_sum(squares) / max(normaliser, torch.finfo(torch.float64).tiny)
        damping = context.layout.expand(self.inverse.damping, vectors).double()
        return curved + (vectors.double().square() * damping).sum(dim=1), examples

    def _run_rows(
        self, blocks: Sequence[Mapping[str, Matrices]], stages: Mapping[str, int] | None = None
    ) -> RowsPass:
        """Return the pass for ``B^T J V`` after it has visited the curvature examples."""
        plan, draws = self.context.plan, self._mixtures()
        room = self.context.options.memory_budget // ROWS_SHARE
        one_pass = RowsPass(plan, *blocks, stages=stages, draws=draws, seed=self._seed, room=room)
        self.context.runner.run(one_pass, self._curvature)
        return one_pass


def takes_long(context: Context) -> bool:
    """Return whether passes over the training data are long, by the operations of called layers.

    Factors have to be there.
    """
    each = sum(
        math.prod(layer.shape) * _count_positions(context, name)
        for name, layer in context.plan.layers.items()
        if not isinstance(layer.rule, ParameterRule)
    )
    return is_long(each * context.train.num_examples, context.device.type)


def _count_positions(context: Context, name: str) -> float:
    """Return the positions of an example in a layer, as its factors have seen them."""
    factors = context.state.factors
    assert factors is not None
    layer = factors.layers[name]
    return layer.positions / max(1.0, layer.examples)


def is_few(queries: int) -> bool:
    """Return whether a small space serves so many queries, where passes are long."""
    return queries * _ANCHORS_EACH < MOST_ANCHORS


def count_examples_for_few(queries: int, num_examples: int) -> int:
    """Return the curvature examples of a small space, of so many training examples."""
    return queries * max(_FEWEST_EXAMPLES, num_examples // _EXAMPLES_SHARE)


def choose_builder(builder: CoarseBuilder, queries: int | None = None) -> CoarseBuilder | CompactBuilder:
    """Return the builder of the compact space where the dense one would lack memory, else the given one.

    Args:
        builder: of the dense space.
        queries: how many are asked about, if a smaller space will do for few; None for one that serves all.
    """
    context, inverse, tolerance = builder.context, builder.inverse, builder.tolerance
    compact = CompactBuilder(context, inverse, builder.most_examples, tolerance)
    if compact.known is not None:
        return compact
    if builder.holds_all() or not compact.may_help(builder.limit):
        return builder
    if queries is not None and is_few(queries) and takes_long(context):
        examples = min(builder.most_examples, count_examples_for_few(queries, context.train.num_examples))
        return CompactBuilder(context, inverse, examples, tolerance, queries * _ANCHORS_EACH)
    compact.look()
    fits, known = compact.count_affordable(), builder.known
    if fits < _WORTH * builder.limit or (known is not None and known.size >= fits):
        compact.share(builder)
        return builder
    return compact
