"""The coarse space in little memory: how many directions of which rank, and the passes that make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.compact_solving import solve_in_rank
from lightning_influence.curvature.compact_space import CompactSpace, CurvatureRows
from lightning_influence.curvature.compact_two_level import CompactTwoLevel, rescale_compact
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.low_rank_matrices import (
    Matrices,
    compress,
    count_numbers,
    draw_rank_one,
    join_matrices,
    make_matrices,
)
from lightning_influence.curvature.row_passes import CombinationPass, RowsPass
from lightning_influence.methods.coarse_building import CoarseBuilder, SpaceBuilder, count_vector_bytes
from lightning_influence.methods.forecast import ANSWER_RANK
from lightning_influence.methods.gathering import differentiate
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import LayerPlan

# Ranks to cut directions to, best first: the first with which all of them fit. Measured on the digits MLP and
# CNN: with rank 4 the correlation with retraining is that of whole directions, with rank 1 nearly so.
RANKS = (4, 2, 1)
# Chosen by hand: residuals are priced to a relative error of at most sqrt(8 / 64) / 2, about a sixth; of
# twice that where a quarter of the space's memory has no room for more.
PROBES, _FEWEST_PROBES = 64, 16
_PROBE_SEED = 20_240_602
# Chosen by hand: the share of the memory budget that the space may take; queries need the rest.
_SHARE = 2
#: The share that output gradients may take while curvature rows are found.
ROWS_SHARE = 4
# Where this many times as many directions fit as in dense form, they are held compactly.
_WORTH = 2
# The most columns of the output curvature that products are made of; see CurvaturePass.
MOST_COLUMNS = 64
# Stages to divide layers into. On a ResNet-18 (300 images, damping .003), where EK-FAC's residuals are
# 400 to 1,400: with 100 directions of rank 1 they are 13 to 36 in one stage, 5 to 11 in two, 2.3 to 6.5 in
# four, 1.4 to 3.1 in 16; with 25 directions 82 to 146, 57 to 61, 26 to 48, 12 to 18. So four times as many
# stages are worth about twice as many directions. Rank 4 makes 12 to 35, 2.1 to 4.9, 1.4 to 2.8 of it.
STAGES = (16, 8, 4, 2, 1)
_STAGED, _RANKED = 0.5, 0.1
# Chosen by hand: parts of directions that may span the space, whose Galerkin matrix is factorised; and ranks
# of all directions together, by which the cost of products with them grows.
_MOST_PARTS, _MOST_RANKS = 2048, 1024


@dataclass(frozen=True)
class Plan:
    """What a compact space is made of.

    Attributes:
        rank: of the directions in a layer.
        stages: how many stages have directions of their own.
        count: of directions.
        probes: how many.
    """

    rank: int
    stages: int
    count: int
    probes: int

    @property
    def worth(self) -> float:
        """How much such a space is worth, in numbers that mean something beside one another only."""
        return float(self.count * self.stages**_STAGED * self.rank**_RANKED)


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

    def find(self) -> CompactSpace:
        """Return the space, on the context's device; a kept one grows if there is room for more anchors."""
        context, state, known = self.context, self.context.state, self.known
        if known is None or self.count_affordable(known) > max(known.limit, known.size):
            grown = self._build(None if known is None else known.to(context.device))
            context.made |= known is None or grown.size > known.size
            state.compact, state.compact_key = grown, self.key
        context.reused |= known is not None
        assert state.compact is not None
        space = state.compact.to(context.device)
        context.extra["coarse_rank"], context.extra["coarse_stages"] = space.rank, space.num_stages
        self._tell(space)
        return space

    def set_up(self) -> tuple[CompactSpace, BlockInverse, CompactTwoLevel]:
        """Find the space, and what corrects with it; see :meth:`.CoarseBuilder.set_up`."""
        space = self.find()
        inverse = self.rescale(space)
        return space, inverse, self.correct(inverse, space)

    def rescale(self, space: CompactSpace) -> BlockInverse:
        """Return EK-FAC, rescaled where outputs are many, as for the dense space."""
        return rescale_compact(self.inverse, space) if space.mixtures else self.inverse

    def correct(self, inverse: BlockInverse, space: CompactSpace) -> CompactTwoLevel:
        """Return the two-level operator of a preconditioner."""
        runner, draws = self.context.runner, self._mixtures()
        like = space.rows.values

        def find_rows(vectors: Mapping[str, Matrices]) -> CurvatureRows:
            return self._run_rows([vectors]).rows(like)

        def combine(rows: CurvatureRows) -> Tensor:
            one_pass = CombinationPass(self.context.plan, rows, draws=draws, seed=self._seed)
            runner.run(one_pass, self._curvature)
            return one_pass.result(runner.all_reduce_sum)

        return CompactTwoLevel(inverse, space, find_rows, combine, runner.all_reduce_sum)

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
        context, factors = self.context, self.context.state.factors
        if not low_rank or factors is None:
            return 8 * count_vector_bytes(context)
        total = 0
        for name, (groups, d_out, d_in) in context.layout.shapes.items():
            layer, pair = factors.layers[name], d_out + d_in
            positions = layer.positions / max(1.0, layer.examples)
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
        return Plan(rank, stages, max(1, min(most, (room - probes * probe) // each)), probes)

    def _build(self, space: CompactSpace | None) -> CompactSpace:
        """Return the space with as many anchors as fit.

        Args:
            space: what there is already, made of the first anchors in the same order.
        """
        context, inverse = self.context, self.inverse if space is None else space.inverse
        sample = self._sample(self._wanted())
        found = self._weigh(sample, inverse)
        plan = self._choose(space)
        rank, limit = plan.rank, plan.count
        size = 0 if space is None else space.size
        most = min(limit, sample.num_examples)
        if size >= most:
            assert space is not None
            return replace(space, limit=limit)
        chosen = self._draw(found, most)[size:most]
        anchors = AnchorPass(context.plan, inverse, rank, chosen, context.dtype)
        context.runner.run(anchors, sample.holding(chosen))
        directions = anchors.collect(context.runner)
        like = torch.empty(0, device=context.device, dtype=context.dtype)
        gather = context.runner.all_gather_cat if context.runner.world_size > 1 else None
        if space is not None:
            grown = space.grown(directions, self._run_rows([directions], space.stages).rows(like, gather))
            return replace(grown, limit=limit)
        probes = draw_rank_one(context.layout.shapes, plan.probes, _PROBE_SEED, like)
        stages = divide_layers(list(context.layout.shapes), plan.stages)
        one_pass = self._run_rows([probes, directions], stages)
        one_pass.count.reduce(context.runner.all_reduce_sum)
        mixtures = self._mixtures() if one_pass.estimated and one_pass.columns is not None else 0
        rows, normaliser = one_pass.rows(like, gather), one_pass.count.normaliser
        return CompactSpace(
            context.layout, directions, probes, rows, normaliser, inverse, mixtures, rank, limit, stages
        )

    def _run_rows(
        self, blocks: Sequence[Mapping[str, Matrices]], stages: Mapping[str, int] | None = None
    ) -> RowsPass:
        """Return the pass for ``B^T J V`` after it has visited the curvature examples."""
        plan, draws = self.context.plan, self._mixtures()
        room = self.context.options.memory_budget // ROWS_SHARE
        one_pass = RowsPass(plan, *blocks, stages=stages, draws=draws, seed=self._seed, room=room)
        self.context.runner.run(one_pass, self._curvature)
        return one_pass


def choose_builder(builder: CoarseBuilder) -> CoarseBuilder | CompactBuilder:
    """Return the builder of the compact space where the dense one would lack memory, else the given one.

    Args:
        builder: of the dense space.
    """
    compact = CompactBuilder(builder.context, builder.inverse, builder.most_examples, builder.tolerance)
    if compact.known is not None:
        return compact
    if builder.holds_all() or not compact.may_help(builder.limit):
        return builder
    compact.look()
    fits, known = compact.count_affordable(), builder.known
    if fits < _WORTH * builder.limit or (known is not None and known.size >= fits):
        compact.share(builder)
        return builder
    return compact
