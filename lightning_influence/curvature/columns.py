"""What passes over curvature gradients share: which columns of the output curvature they are made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from lightning_influence.curvature.base import AveragingPass
from lightning_influence.layers import FactoredGradients, LayerPlan
from lightning_influence.losses.mixing import balanced_signs
from lightning_influence.passes.captured import MAX_COLUMNS, Captured, Fisher
from lightning_influence.passes.statistics import label_generator

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
        fisher = self._choose(captured)
        generator = None
        if captured.loss is not None and fisher in {"sampled", "mixed"}:
            generator = label_generator(self._seed, self._batches, captured.loss.outputs.device)
        self._batches += 1
        self.estimated |= fisher != "exact"
        if fisher == "mixed":
            return captured.mixed_gradients(self._draws, generator)
        return captured.curvature_gradients(fisher, generator, self._draws)

    def _runs(self, captured: Captured) -> Iterator[dict[str, FactoredGradients]]:
        """Yield the same gradients a few seeds at a time, so that their number needs no memory."""
        loss = captured.loss
        fisher = self._choose(captured)
        refused = fisher == "exact" and loss is not None and loss.num_columns > MAX_COLUMNS
        if loss is None or fisher not in {"exact", "mixed"} or refused:
            yield self._gradients(captured)
            return
        if fisher == "mixed":
            generator = label_generator(self._seed, self._batches, loss.outputs.device)
            weights = balanced_signs(loss.column_energies(), self._draws, generator)
            seeds: Iterator[Tensor] = (loss.mix_columns(few) for few in weights)
        else:
            seeds = iter(loss.columns())
        self._batches += 1
        self.estimated |= fisher != "exact"
        each = captured.num_examples * self._output_bytes(captured)
        size = max(1, _SEED_BYTES // max(1, each))
        while few := list(itertools.islice(seeds, size)):
            yield captured.recorder.gradients(loss.outputs, list(few), captured.num_examples)

    def _output_bytes(self, captured: Captured) -> int:
        """Return about how many bytes the output gradients of one example take, for one seed."""
        total = 0
        for name, x in captured.recorder.raw_inputs().items():
            layer = self._plan.layers[name]
            weight = layer.rule.weight(layer.module)
            total += x.nbytes // max(1, weight.shape[1]) * layer.d_out
        return total // max(1, captured.num_examples)

    def _choose(self, captured: Captured) -> Fisher | Literal["mixed"]:
        if captured.loss is None:
            return "empirical"
        self.columns = captured.loss.num_columns
        if self._fisher is not None:
            return self._fisher
        return "exact" if self.columns <= max(self._max_columns, self._draws) else "mixed"
