"""Building the coarse space of ``auto``: which anchors, how many, and their products with the curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.curvature.coarse_space import CoarseSpace, extended, preconditioned, probes, scored
from lightning_influence.curvature.gauss_newton import CurvatureProductPass
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.two_level import TwoLevel, rescaled
from lightning_influence.linalg.orthonormal import orthonormalise
from lightning_influence.methods.context import Context
from lightning_influence.methods.gathering import GradientPass, gather
from lightning_influence.methods.scoring_passes import SelfInfluencePass
from lightning_influence.methods.weighted_squares import PreconditionedSquares
from lightning_influence.model.gradients import LayerGradients
from lightning_influence.support.passes import Loader

# Anchors are training gradients drawn by leverage: 128 are worth twice (digits MLP) to four times (CNN) as
# many drawn evenly (examples/benchmarks/coarse_vectors.py).
FIRST_ANCHORS = 128
MOST_ANCHORS = 512
PROBES = 16
# Where the columns of the output curvature are too many, so many mixtures of them over all examples: about 40
# gradients a direction on the benchmark transformer. With 16 a direction, scores lose .07 of their rank
# correlation with exact ones, with 32 .03 (examples/benchmarks/sketches.py). Queries are not iterated on by
# default: there, block steps with exact products take the correlation from .67 to .67, .80 and .87 (one, two,
# three steps), but a step is two batched backward passes a query over all examples; two steps on the same
# mixtures (max_steps=2) reach .75.
MIXTURES = 4096
_FEWEST_MIXTURES, _MOST_MIXTURES = 4, 64
# Anchors' gradients that are formed at once.
_FORMED_BYTES = 2**26
_CHECK = 32
_MOST_UNSOLVED = 0.25


class CoarseBuilder:
    """Builds a coarse space under the memory budget, in passes over the training data.

    Args:
        context: passes, data, settings.
        inverse: the preconditioner ``P``.
        tolerance: relative residual at which a gradient counts as solved.
    """

    def __init__(self, context: Context, inverse: BlockInverse, tolerance: float) -> None:
        self.context, self.inverse, self.tolerance = context, inverse, tolerance
        self._curvature = context.train.sample(context.options.curvature_examples, context.options.seed + 1)

    def build(self) -> CoarseSpace:
        """Return the coarse space, grown until held-out gradients are solved well enough."""
        context = self.context
        limit = max(1, min(self._affordable(), context.train.num_examples, context.layout.numel // 2))
        wanted = max(limit + _CHECK, context.options.curvature_examples)
        sample = context.train.sample(wanted, context.options.seed + 2)
        total = sample.num_examples
        limit = max(1, min(limit, total - 1))
        order = self._draw(sample, limit)
        held_out = order[limit : limit + _CHECK] if total > 1 else order
        size, space = 0, None
        while size < limit:
            start, size = size, min(limit, max(FIRST_ANCHORS, 2 * size))
            space = self._grow(space, sample, order[start:size])
            if size < limit and self._suffices(space, sample, held_out):
                break
        assert space is not None
        return space

    def _draw(self, sample: Loader, count: int) -> Tensor:
        """Return dataset indices: ``count`` anchors drawn by leverage, then all others in random order.

        The leverage of an example is ``g^T P^{-1} g``.
        """
        squares = PreconditionedSquares(self.inverse)
        one_pass = SelfInfluencePass(
            self.context.plan, lambda gradients: squares(gradients)[0], description="Influence: leverages"
        )
        self.context.runner.run(one_pass, sample)
        indices, leverages = one_pass.gathered(self.context.runner.all_gather_cat, self.context.dtype)
        generator = torch.Generator().manual_seed(self.context.options.seed + 3)
        order = torch.randperm(len(indices), generator=generator)
        shares = leverages[order].double().clamp_min(0)
        shares += shares.mean() * 1e-6 + torch.finfo(torch.float64).tiny  # so that there are enough
        drawn = torch.multinomial(shares, count, generator=generator)
        rest = torch.ones_like(order, dtype=torch.bool)
        rest[drawn] = False
        return indices[torch.cat([order[drawn], order[rest]])]

    def _suffices(self, space: CoarseSpace, sample: Loader, held_out: Tensor) -> bool:
        """Return whether most held-out training gradients have a residual below the tolerance."""
        gradients = self._gradients(sample, held_out, "Influence: held-out gradients")
        residuals = TwoLevel(self.preconditioner(space), space).correction(gradients)[1]
        return float((residuals > self.tolerance).float().mean()) <= _MOST_UNSOLVED

    def _grow(self, space: CoarseSpace | None, sample: Loader, chosen: Tensor) -> CoarseSpace:
        """Return the first coarse space, or a larger one, in one pass for what is new."""
        layout = self.context.layout
        vectors, anchors = self._preconditioned(sample, chosen)
        if space is not None:
            return extended(space, vectors, anchors, lambda fresh: self.products(fresh)[0])
        fresh, mixing, _ = orthonormalise(vectors)
        product, probe_product = self.products(fresh, probes(PROBES, layout.numel, fresh))
        mixtures = self._mixtures() if self._estimated and self._columns is not None else 0
        return CoarseSpace(
            layout,
            fresh,
            product,
            probe_product,
            mixing,
            anchors,
            self.inverse,
            self._examples,
            mixtures,
        )

    def products(self, *blocks: Tensor) -> list[Tensor]:
        """Return ``G V`` over the curvature examples, for blocks of vectors."""
        one_pass = CurvatureProductPass(
            self.context.plan, blocks, draws=self._mixtures(), seed=self.context.options.seed
        )
        self.context.runner.run(one_pass, self._curvature)
        result = one_pass.results(self.context.runner.all_reduce_sum)
        self._examples = one_pass.examples
        self._columns, self._estimated = one_pass.columns, one_pass.estimated
        return result

    def preconditioner(self, space: CoarseSpace) -> BlockInverse:
        """Return EK-FAC, rescaled where outputs are many.

        On a character transformer that helps; on the digits MLP it lowers the rank correlation with exact
        scores (.82 to .77 with 256 anchors), although its step is the best in the norm of ``A``.
        """
        return rescaled(self.inverse, space) if space.mixtures else self.inverse

    def _mixtures(self) -> int:
        """Return how many mixtures of columns an example has; all passes of a coarse space need the same."""
        wanted = -(-MIXTURES // max(1, self._curvature.num_examples))
        return min(_MOST_MIXTURES, max(_FEWEST_MIXTURES, wanted))

    def _preconditioned(self, sample: Loader, chosen: Tensor) -> tuple[Tensor, dict[str, LayerGradients]]:
        """Return ``P^{-1}`` times the anchors' gradients, ``(M, P)``, and those that are scored.

        Some anchors at a time: where their gradients have to be formed, they are not held beside the result.
        """
        rows = max(1, _FORMED_BYTES // self._vector_bytes)
        vectors = torch.empty(
            len(chosen), self.context.layout.numel, dtype=self.context.dtype, device=self.context.device
        )
        parts = []
        for start in range(0, len(chosen), rows):
            part = slice(start, start + rows)
            gradients = self._gradients(sample, chosen[part], "Influence: anchors")
            vectors[part] = preconditioned(self.context.layout, self.inverse, gradients)
            parts.append(scored([gradients]))
        return vectors, scored(parts)

    def _gradients(self, loader: Loader, chosen: Tensor, description: str) -> dict[str, LayerGradients]:
        """Return loss gradients of some of a loader's examples, in the order of their dataset indices."""
        one_pass = GradientPass(self.context.plan, description=description, only=chosen)
        found = gather(self.context, one_pass, [loader.holding(chosen)])
        by_index = found.indices.argsort()
        rows = by_index[torch.searchsorted(found.indices[by_index], chosen)].to(self.context.device)
        return {name: found.gradients.pop(name).select(rows) for name in list(found.gradients)}

    def _affordable(self) -> int:
        """Return how many directions fit.

        Each is held with its product, and :meth:`quadratic` holds what corrects it; to grow, the space is
        held twice.
        """
        room = self.context.options.memory_budget // self._vector_bytes
        most = min(MOST_ANCHORS, room // 3 - PROBES)
        return most if most <= FIRST_ANCHORS else max(FIRST_ANCHORS, min(most, room // 4))

    @property
    def _vector_bytes(self) -> int:
        return vector_bytes(self.context)


def vector_bytes(context: Context) -> int:
    """Return the memory of a flat vector over all covered parameters, in bytes."""
    return context.layout.numel * torch.empty((), dtype=context.dtype).element_size()
