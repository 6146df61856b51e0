"""The coarse space that methods share: which anchors, how many, their curvature products, how it grows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.curvature.coarse_space import (
    CoarseSpace,
    draw_probes,
    extend_space,
    join_scored,
    precondition,
)
from lightning_influence.curvature.compact_space import CompactSpace
from lightning_influence.curvature.gauss_newton import CurvatureProductPass
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.two_level import TwoLevel, rescale_inverse
from lightning_influence.linalg.orthonormal import orthonormalise
from lightning_influence.methods.context import Context, compute_digest
from lightning_influence.methods.gathering import gather_examples
from lightning_influence.methods.scoring_passes import SelfInfluencePass, SelfScores
from lightning_influence.methods.weighted_squares import PreconditionedSquares
from lightning_influence.model.captured import Fisher
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.support.passes import Loader

# Relative residual at which a held-out training gradient counts as solved; that of "auto" as well.
TOLERANCE = 0.2
# Anchors are training gradients drawn by leverage: 128 are worth twice (digits MLP) to four times (CNN) as
# many drawn evenly (examples/benchmarks/coarse_vectors.py).
FIRST_ANCHORS = 128
MOST_ANCHORS = 512
# Chosen by hand: residuals are priced to a relative error of 1 / sqrt(2 * 16), about a sixth, for a small
# part of what the products of the space cost.
PROBES = 16
# Where the columns of the output curvature are too many, so many mixtures of them over all examples: about 40
# gradients a direction on the benchmark transformer. With 16 a direction, scores lose .07 of their rank
# correlation with exact ones, with 32 .03 (examples/benchmarks/sketches.py). Queries are not iterated on by
# default: there, block steps with exact products take the correlation from .67 to .67, .80 and .87 (one, two,
# three steps), but a step is two batched backward passes a query over all examples; two steps on the same
# mixtures (max_steps=2) reach .75.
MIXTURES = 4096
_FEWEST_MIXTURES, MOST_MIXTURES = 4, 64
# Chosen by hand: in all, where a space has few directions because queries are few.
_FEWEST_IN_ALL = 2048
#: The most columns of the output curvature that products are made of; see :class:`.CurvaturePass`.
MOST_COLUMNS = 64
# Chosen by hand: the most anchors' gradients that are formed at once, 64 MiB.
_FORMED_BYTES = 2**26
# Chosen by hand: the share of the memory budget that vectors may take which are made or multiplied at once.
_MULTIPLIED = 8
# Chosen by hand: 32 held-out gradients tell a share of a quarter to about .08.
_CHECK = 32
_MOST_UNSOLVED = 0.25


class SpaceBuilder:
    """What builders of coarse spaces share: anchors drawn by leverage, and products with the curvature.

    Args:
        context: passes, data, settings, and the state that keeps the space.
        inverse: the preconditioner ``P``.
        curvature_examples: at most so many training examples enter the products.
        tolerance: relative residual at which a gradient counts as solved.
        most_anchors: whatever the memory; None for :data:`MOST_ANCHORS`.
    """

    def __init__(
        self,
        context: Context,
        inverse: BlockInverse,
        curvature_examples: int,
        tolerance: float = TOLERANCE,
        most_anchors: int | None = None,
    ) -> None:
        self.context, self.inverse, self.tolerance = context, inverse, tolerance
        self.most_anchors = most_anchors or MOST_ANCHORS
        self._seed, self.most_examples = context.options.seed, curvature_examples
        self._found: tuple[int, SelfScores] | None = None  # leverages, of a sample of that size
        self._curvature = context.train.sample(curvature_examples, self._seed + 1)

    @property
    def is_small(self) -> bool:
        """Whether the space is made for few queries alone."""
        return self.most_anchors < MOST_ANCHORS

    @property
    def key(self) -> str:
        """What a coarse space is kept under."""
        context = self.context
        return compute_digest(
            context.weights_key,
            context.train.num_examples,
            min(self.most_examples, context.train.num_examples),
            self._seed,
            context.layout.shapes,
            context.dtype,
            # Rows of other mixtures are of another matrix. Large spaces of as many examples have the same.
            *([self._mixtures()] if self.is_small else []),
        )

    def multiply(self, vectors: Tensor) -> Tensor:
        """Return ``G V`` over the curvature examples for ``V (V, P)``."""
        # Few vectors take less by second derivatives. Mixtures of columns make another matrix.
        columns = self.context.state.columns.get(self.key, MOST_COLUMNS + 1)
        one_pass = self._run_products([vectors], "exact" if columns <= MOST_COLUMNS else None)
        return one_pass.result(self.context.runner.all_reduce_sum)

    def _wanted(self) -> int:
        """Return how many anchors there may be whatever the memory."""
        return max(1, min(self.most_anchors, self.context.train.num_examples, self.context.layout.numel // 2))

    def share(self, other: SpaceBuilder) -> None:
        """Hand over what the pass for leverages has found, to a builder with the same preconditioner."""
        other._found = self._found

    def _tell(self, space: CoarseSpace | CompactSpace) -> None:
        """Tell in the answer what the space is made of."""
        extra = self.context.extra
        extra["coarse_space"], extra["curvature_examples"] = space.size, space.examples
        if space.mixtures:
            extra["curvature_mixtures"] = space.mixtures

    def _sample(self, count: int) -> Loader:
        """Return the examples that ``count`` anchors are drawn from, and what is held out."""
        return self.context.train.sample(max(count + _CHECK, self.most_examples), self._seed + 2)

    def _weigh(self, sample: Loader, inverse: BlockInverse) -> SelfScores:
        """Return the leverage of every example, ``g^T P^{-1} g``; they are found once."""
        if self._found is not None and self._found[0] == sample.num_examples:
            return self._found[1]
        squares = PreconditionedSquares(inverse)
        one_pass = SelfInfluencePass(
            self.context.plan, lambda gradients: squares(gradients)[0], description="Influence: leverages"
        )
        self.context.runner.run(one_pass, sample)
        found = one_pass.gather(self.context.runner.all_gather_cat, self.context.dtype)
        columns = int(self.context.runner.all_gather_cat(torch.tensor([max(1, one_pass.columns)])).max())
        self.context.state.columns[self.key] = columns
        self._found = sample.num_examples, found
        return found

    def _draw(self, found: SelfScores, count: int) -> Tensor:
        """Return dataset indices: ``count`` anchors drawn by leverage, then all others in random order.

        A larger count begins with the same anchors.
        """
        generator = torch.Generator().manual_seed(self._seed + 3)
        order = torch.randperm(len(found.indices), generator=generator)
        shares = found.values[order].double().clamp_min(0)
        shares += shares.mean() * 1e-6 + torch.finfo(torch.float64).tiny  # so that there are enough
        drawn = torch.multinomial(shares, count, generator=generator)
        rest = torch.ones_like(order, dtype=torch.bool)
        rest[drawn] = False
        return found.indices[torch.cat([order[drawn], order[rest]])]

    def _run_products(self, blocks: list[Tensor], fisher: Fisher | None = None) -> CurvatureProductPass:
        """Return the pass for ``G V`` after it has visited the curvature examples."""
        one_pass = CurvatureProductPass(
            self.context.plan,
            blocks,
            fisher=fisher,
            draws=self._mixtures(),
            seed=self._seed,
            most_bytes=self.context.options.memory_budget // _MULTIPLIED,
        )
        self.context.runner.run(one_pass, self._curvature)
        return one_pass

    def _mixtures(self) -> int:
        """Return how many mixtures of columns an example has; all passes of a coarse space need the same."""
        total = MIXTURES * self.most_anchors // MOST_ANCHORS
        wanted = -(-max(_FEWEST_IN_ALL, total) // max(1, self._curvature.num_examples))
        return min(MOST_MIXTURES, max(_FEWEST_MIXTURES, wanted))


class CoarseBuilder(SpaceBuilder):
    """Finds the coarse space of the context's model: the one that is kept, grown if need be, or a new one."""

    def find(self) -> CoarseSpace:
        """Return the coarse space, on the context's device.

        A space that an earlier call built is used again for the same weights, examples and layers. It grows
        if this call has room for more anchors, or a lower tolerance, than the call that ended its growth.
        """
        context, state = self.context, self.context.state
        key = self.key
        known = self.known
        limit = self.limit
        if known is None or self._may_improve(known, limit):
            grown = self._build(None if known is None else known.to(context.device), limit)
            context.made |= known is None or grown.size > known.size
            state.coarse, state.coarse_key = grown, key
        context.reused |= known is not None
        assert state.coarse is not None
        space = state.coarse.to(context.device)
        self._tell(space)
        return space

    def set_up(self) -> TwoLevel:
        """Find the coarse space, and return what corrects with it."""
        space = self.find()
        return self.correct(self.rescale(space), space)

    @property
    def known(self) -> CoarseSpace | None:
        """The space that an earlier call has kept."""
        state = self.context.state
        return state.coarse if state.coarse_key == self.key else None

    def rescale(self, space: CoarseSpace) -> BlockInverse:
        """Return EK-FAC, rescaled where outputs are many.

        On a character transformer that helps; on the digits MLP it lowers the rank correlation with exact
        scores (.82 to .77 with 256 anchors), although its step is the best in the norm of ``A``.
        """
        return rescale_inverse(self.inverse, space) if space.mixtures else self.inverse

    def correct(self, inverse: BlockInverse, space: CoarseSpace) -> TwoLevel:
        """Return the two-level operator of a preconditioner; it forms what the memory budget has room for."""
        return TwoLevel(inverse, space, self.context.options.memory_budget // (2 * _MULTIPLIED))

    def holds_all(self) -> bool:
        """Return whether the memory budget leaves room for all anchors that there may ever be."""
        return self.limit == self._wanted()

    def _may_improve(self, space: CoarseSpace, limit: int) -> bool:
        """Return whether growing was ended by a lower limit, or by a higher tolerance, than there is now."""
        return self.tolerance < space.tolerance if space.solves else limit > space.limit

    @property
    def limit(self) -> int:
        """Return how many anchors there may be."""
        return max(1, min(self._affordable(), self._wanted()))

    def _build(self, space: CoarseSpace | None, limit: int) -> CoarseSpace:
        """Return the coarse space, grown until held-out gradients are solved well enough.

        Args:
            space: what there is already, made of the first anchors in the same order.
            limit: most anchors.
        """
        sample = self._sample(limit)
        total = sample.num_examples
        most = max(1, min(limit, total - 1))
        size, solves = 0 if space is None else space.mixing.shape[1], False
        if space is not None and size >= most:
            return replace(space, limit=limit, tolerance=self.tolerance)
        found = self._weigh(sample, self.inverse if space is None else space.inverse)
        order = self._draw(found, most)
        held_out = order[most : most + _CHECK] if total > 1 else order
        if space is not None:
            solves = self._suffices(space, sample, held_out)
        while size < most and not solves:
            start, size = size, min(most, max(FIRST_ANCHORS, 2 * size))
            space = self._grow(space, sample, order[start:size])
            solves = size < most and self._suffices(space, sample, held_out)
        assert space is not None
        return replace(space, limit=limit, tolerance=self.tolerance, solves=solves)

    def _suffices(self, space: CoarseSpace, sample: Loader, held_out: Tensor) -> bool:
        """Return whether most held-out training gradients have a residual below the tolerance."""
        gradients = gather_examples(self.context, sample, held_out, "Influence: held-out gradients")
        residuals = self.correct(self.rescale(space), space).correction(gradients)[1]
        return float((residuals > self.tolerance).float().mean()) <= _MOST_UNSOLVED

    def _grow(self, space: CoarseSpace | None, sample: Loader, chosen: Tensor) -> CoarseSpace:
        """Return the first coarse space, or a larger one, in one pass for what is new."""
        layout = self.context.layout
        first = self.inverse if space is None else space.inverse
        vectors, anchors = self._precondition(sample, chosen, first)
        if space is not None:
            return extend_space(space, vectors, anchors, self.multiply)
        fresh, mixing, _ = orthonormalise(vectors)
        one_pass = self._run_products([fresh, draw_probes(PROBES, layout.numel, fresh)])
        product, probe_product = one_pass.results(self.context.runner.all_reduce_sum)
        mixtures = self._mixtures() if one_pass.estimated and one_pass.columns is not None else 0
        return CoarseSpace(
            layout, fresh, product, probe_product, mixing, anchors, first, one_pass.count.examples, mixtures
        )

    def _precondition(
        self, sample: Loader, chosen: Tensor, inverse: BlockInverse
    ) -> tuple[Tensor, dict[str, LayerGradients]]:
        """Return ``P^{-1}`` times the anchors' gradients, ``(M, P)``, and those that are scored.

        Some anchors at a time: where their gradients have to be formed, they are not held beside the result.
        """
        context = self.context
        formed = min(_FORMED_BYTES, context.options.memory_budget // _MULTIPLIED)
        rows = max(1, formed // count_vector_bytes(context))
        vectors = torch.empty(len(chosen), context.layout.numel, dtype=context.dtype, device=context.device)
        parts = []
        for start in range(0, len(chosen), rows):
            part = slice(start, start + rows)
            gradients = gather_examples(context, sample, chosen[part], "Influence: anchors")
            vectors[part] = precondition(context.layout, inverse, gradients)
            parts.append(join_scored([gradients]))
        return vectors, join_scored(parts)

    def _affordable(self) -> int:
        """Return how many directions fit.

        Each is held with its product, and self-influence holds what corrects it; to grow, the space is held
        twice.
        """
        room = self.context.options.memory_budget // count_vector_bytes(self.context)
        most = min(MOST_ANCHORS, room // 3 - PROBES)
        return most if most <= FIRST_ANCHORS else max(FIRST_ANCHORS, min(most, room // 4))


def count_vector_bytes(context: Context) -> int:
    """Return the memory of a flat vector over all covered parameters, in bytes."""
    return context.layout.numel * torch.empty((), dtype=context.dtype).element_size()
