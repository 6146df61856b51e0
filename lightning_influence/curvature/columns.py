"""What passes over curvature gradients share: which columns of the output curvature they are made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from lightning_influence.curvature.base import AveragingPass
from lightning_influence.layers import FactoredGradients, LayerPlan
from lightning_influence.passes.captured import RANDOM, Captured, Fisher
from lightning_influence.passes.statistics import draw_generator

# Most bytes of output gradients that are recorded at once where products are all that is wanted of them.
_SEED_BYTES = 2**26


class CurvaturePass(AveragingPass):
    """What passes over curvature gradients share: which ones, and counting.

    Args:
        plan: the covered layers.
        fisher: which curvature gradients to use; None for exact columns while there are few of them, and
            random mixtures of them beyond (see :mod:`~lightning_influence.losses.mixing`).
        max_columns: largest ``K`` for which every column of the output curvature is used, if ``fisher`` is
            None.
        draws: sampled labels, or mixtures, per example.
        seed: seed of the labels or signs.

    Attributes:
        columns: ``K`` of the last batch; None if the outputs are unknown.
        estimated: whether the result is an estimate, from mixtures, sampled or training labels.
    """

    def __init__(
        self,
        plan: LayerPlan,
        *,
        fisher: Fisher | None = None,
        max_columns: int = 64,
        draws: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(plan)
        self._plan = plan
        self.columns: int | None = None
        self.estimated = False
        self._fisher = fisher
        self._max_columns, self._draws, self._seed = max_columns, draws, seed
        self._batches = 0

    def _gradients(self, captured: Captured) -> dict[str, FactoredGradients]:
        """Return curvature gradients of one batch."""
        fisher, generator = self._next(captured)
        return captured.curvature_gradients(fisher, generator, self._draws)

    def _runs(self, captured: Captured) -> Iterator[dict[str, FactoredGradients]]:
        """Yield the same gradients a few seeds at a time, so that their number needs no memory."""
        fisher, generator = self._next(captured)
        if captured.loss is None:
            yield captured.curvature_gradients(fisher)
            return
        seeds = captured.curvature_seeds(fisher, generator, self._draws)
        size = max(1, _SEED_BYTES // max(1, captured.num_examples * self._output_bytes(captured)))
        while few := list(itertools.islice(seeds, size)):
            yield captured.recorder.gradients(captured.loss.outputs, list(few), captured.num_examples)

    def _next(self, captured: Captured) -> tuple[Fisher, torch.Generator | None]:
        """Return what the next batch's gradients are, and where their draws come from."""
        fisher, generator = self._choose(captured), None
        if captured.loss is not None and fisher in RANDOM:
            generator = draw_generator(self._seed, self._batches, captured.loss.outputs.device)
        self._batches += 1
        self.estimated |= fisher != "exact"
        return fisher, generator

    def _output_bytes(self, captured: Captured) -> int:
        """Return about how many bytes the output gradients of one example take, for one seed."""
        total = 0
        for name, x in captured.recorder.raw_inputs().items():
            layer = self._plan.layers[name]
            weight = layer.rule.weight(layer.module)
            total += x.nbytes // max(1, weight.shape[1]) * layer.d_out
        return total // max(1, captured.num_examples)

    def _choose(self, captured: Captured) -> Fisher:
        if captured.loss is None:
            return "empirical"
        self.columns = captured.loss.num_columns
        if self._fisher is not None:
            return self._fisher
        return "exact" if self.columns <= max(self._max_columns, self._draws) else "mixed"
