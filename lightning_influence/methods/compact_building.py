"""The coarse space in little memory: how many directions of which rank, and the passes that make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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
from lightning_influence.methods.coarse_building import CoarseBuilder, SpaceBuilder
from lightning_influence.methods.gathering import differentiate
from lightning_influence.model.forward import Forward
from lightning_influence.model.plan import LayerPlan

# Ranks to cut directions to, best first: the first with which all of them fit. Measured on the digits MLP and
# CNN: with rank 4 the correlation with retraining is that of whole directions, with rank 1 nearly so.
RANKS = (4, 2, 1)
# Chosen by hand: residuals are priced to a relative error of at most sqrt(8 / 64) / 2, about a sixth; of
# twice that where a quarter of the space's memory has no room for more.
PROBES, _FEWEST_PROBES = 64, 16
_PROBE_SEED = 20_240_602
# Chosen by hand: the share of the memory budget that the space may take; queries need the rest.
_SHARE = 2
# Where this many times as many directions fit as in dense form, they are held compactly.
_WORTH = 2
# The most columns of the output curvature that products are made of; see CurvaturePass.
_MOST_COLUMNS = 64
# Chosen by hand: bytes of anchors' gradients that are formed at once.
_FORMED_BYTES = 2**23


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
            weights = inverse.eigenvalues
            each = max(1, _FORMED_BYTES // (4 * weights.nbytes))
            for few in torch.split(rows.to(weights.device), each):
                if name in gradients:
                    solved = inverse.apply(gradients[name].select(few).dense()[0].to(self._dtype))
                else:
                    solved = weights.new_zeros(len(few), *weights.shape, dtype=self._dtype)
                self._parts[name].append(compress(solved, self._rank))
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
        context.extra["coarse_rank"] = space.rank
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
            return self._run_rows(vectors).rows(like)

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
        return self._count(min(RANKS), None, 1)[0] >= _WORTH * dense

    def count_affordable(self, known: CompactSpace | None = None) -> int:
        """Return how many directions fit, by what is known of the outputs."""
        return self._choose(known)[1]

    def _choose(self, known: CompactSpace | None) -> tuple[int, int, int]:
        """Return the rank, how many directions of it fit, and how many probes."""
        ranks = RANKS if known is None else (known.rank,)
        counts = [(rank, *self._count(rank, known)) for rank in ranks]
        return max(counts, key=lambda pair: pair[1])  # the first of equal ones

    def _count(self, rank: int, known: CompactSpace | None, columns: int = 0) -> tuple[int, int]:
        """Return how many directions of a rank fit, and how many probes beside them."""
        context = self.context
        width = torch.empty((), dtype=context.dtype).element_size()
        draws = self._mixtures()
        columns = columns or self.context.state.columns.get(self.key, 0) or _MOST_COLUMNS
        if known is not None:
            columns = known.rows.values.shape[1]
        elif columns > max(_MOST_COLUMNS, draws):
            columns = draws
        rows = columns * self._curvature.num_examples
        shapes = context.layout.shapes.values()
        each = width * (rows + sum(count_numbers(shape, rank) for shape in shapes))
        probe = width * (rows + sum(groups * (d_out + d_in) for groups, d_out, d_in in shapes))
        room = context.options.memory_budget // _SHARE
        probes = max(_FEWEST_PROBES, min(PROBES, room // (4 * probe)))
        if known is not None:
            probes = known.num_probes
        return max(1, min(self._wanted(), (room - probes * probe) // each)), probes

    def _build(self, space: CompactSpace | None) -> CompactSpace:
        """Return the space with as many anchors as fit.

        Args:
            space: what there is already, made of the first anchors in the same order.
        """
        context, inverse = self.context, self.inverse if space is None else space.inverse
        sample = self._sample(self._wanted())
        found = self._weigh(sample, inverse)
        rank, limit, count = self._choose(space)
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
            grown = space.grown(directions, self._run_rows(directions).rows(like, gather))
            return replace(grown, limit=limit)
        probes = draw_rank_one(context.layout.shapes, count, _PROBE_SEED, like)
        one_pass = self._run_rows(probes, directions)
        one_pass.count.reduce(context.runner.all_reduce_sum)
        mixtures = self._mixtures() if one_pass.estimated and one_pass.columns is not None else 0
        rows, normaliser = one_pass.rows(like, gather), one_pass.count.normaliser
        return CompactSpace(
            context.layout, directions, probes, rows, normaliser, inverse, mixtures, rank, limit
        )

    def _run_rows(self, *blocks: Mapping[str, Matrices]) -> RowsPass:
        """Return the pass for ``B^T J V`` after it has visited the curvature examples."""
        one_pass = RowsPass(self.context.plan, *blocks, draws=self._mixtures(), seed=self._seed)
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
