"""What passes over curvature gradients share: averages over all processes' examples, and the columns used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.captured import RANDOM, Captured, Fisher, WeightedCount
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import LayerPlan, Layout
from lightning_influence.model.losses.draws import ExampleGenerator
from lightning_influence.support.errors import NonFiniteError


class AveragingPass:
    """A pass whose result is a sum over examples divided by what normalises the losses.

    Args:
        plan: the covered layers.

    Attributes:
        layout: the order of flat vectors.
        count: the examples seen, by all processes once the result was asked for.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.layout = Layout.of(plan.layers)
        self.count = WeightedCount()
        self.forward = Forward(plan)

    def _capture(self, module: Any, batch: Any, num_examples: int) -> Captured:
        """Return the batch after its forward pass, counted."""
        captured = self.forward(module, batch, num_examples)
        self.count.add(captured)
        return captured

    def _total(
        self,
        sums: Tensor,
        all_reduce_sum: Callable[[Tensor], Tensor] | None,
        mean_weight: float | None = None,
    ) -> Tensor:
        """Average over the examples, of all processes if their sum is given.

        Args:
            sums: the sums of this process, changed in place.
            all_reduce_sum: sums a tensor over the processes.
            mean_weight: mean loss weight of an example; that of the examples seen if None.

        Returns:
            The average.
        """
        return self._totals([sums], all_reduce_sum, mean_weight)[0]

    def _totals(
        self,
        sums: Sequence[Tensor],
        all_reduce_sum: Callable[[Tensor], Tensor] | None,
        mean_weight: float | None = None,
    ) -> list[Tensor]:
        """Average several sums over the same examples, as :meth:`_total` does one.

        Args:
            sums: the sums of this process, changed in place.
            all_reduce_sum: sums a tensor over the processes.
            mean_weight: mean loss weight of an example; that of the examples seen if None.

        Returns:
            The averages.

        Raises:
            NonFiniteError: if an entry is NaN or infinite: one bad batch spoils the sum.
        """
        if all_reduce_sum is not None:
            sums = [all_reduce_sum(part) for part in sums]
            self.count.reduce(all_reduce_sum)
        if not all(bool(torch.isfinite(part.sum())) for part in sums):
            raise NonFiniteError(
                "The curvature of the training loss is not finite. Check the training examples and the "
                "model's weights for NaN or infinity."
            )
        divisor = self.count.normaliser
        if mean_weight is not None:
            divisor = mean_weight * max(self.count.examples, 1)
        return [part.div_(divisor) for part in sums]


# Chosen by hand: bytes of output gradients recorded at once where only products with them are wanted, if no
# more room is given.
_SEED_BYTES = 2**26


class CurvaturePass(AveragingPass):
    """What passes over curvature gradients share: which ones, and counting.

    Args:
        plan: the covered layers.
        fisher: which curvature gradients to use; None for exact columns while there are few of them, and
            random mixtures of them beyond (see :mod:`~lightning_influence.model.losses.draws`).
        max_columns: largest ``K`` for which every column of the output curvature is used, if ``fisher`` is
            None.
        draws: sampled labels, or mixtures, per example.
        seed: seed of the labels or signs.
        room: bytes that output gradients may take where only products with them are wanted, if there is more
            than little.

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
        room: int = 0,
    ) -> None:
        super().__init__(plan)
        self._plan, self._room = plan, room
        self.columns: int | None = None
        self.estimated = False
        self._fisher = fisher
        self._max_columns, self._draws, self._seed = max_columns, draws, seed

    def _gradients(self, captured: Captured, indices: Tensor) -> dict[str, LayerGradients]:
        """Return curvature gradients of a batch, whose draws follow its dataset indices ``(B,)``."""
        fisher, generator = self._next(captured, indices)
        return captured.curvature_gradients(fisher, generator, self._draws)

    def _runs(
        self, captured: Captured, indices: Tensor, weights: Tensor | None = None
    ) -> Iterator[dict[str, LayerGradients]]:
        """Yield the same gradients a few seeds at a time, so that their number needs no memory.

        Args:
            captured: a batch of a known loss, or of any if there are no weights.
            indices: dataset indices of its examples, ``(B,)``.
            weights: ``(K, B, V)``, to yield the ``V`` weighted sums of an example's gradients in place of
                these: one backward pass for each sum.

        Returns:
            Gradients by layer.
        """
        fisher, generator = self._next(captured, indices)
        if captured.loss is None:
            yield captured.curvature_gradients(fisher)
            return
        seeds = captured.curvature_seeds(fisher, generator, self._draws)
        if weights is not None:
            seeds = _mix(seeds, weights)
        each = captured.num_examples * self._output_bytes(captured)
        size = max(1, max(_SEED_BYTES, self._room) // max(1, each))
        while few := list(itertools.islice(seeds, size)):
            yield captured.recorder.gradients(captured.loss.outputs, list(few), captured.num_examples)

    def _next(self, captured: Captured, indices: Tensor) -> tuple[Fisher, torch.Generator | None]:
        """Return what a batch's gradients are, and where their draws come from."""
        fisher, generator = self._choose(captured), None
        if captured.loss is not None and fisher in RANDOM:
            generator = ExampleGenerator(self._seed, indices)
        self.estimated |= fisher != "exact"
        return fisher, generator

    def _output_bytes(self, captured: Captured) -> int:
        """Return about how many bytes the output gradients of one example take, for one seed."""
        total = 0
        for name, x in captured.recorder.raw_inputs().items():
            layer = self._plan.layers[name]
            width = layer.rule.weight(layer.module).shape[0 if layer.rule.transposed else 1]
            total += x.nbytes // max(1, width) * layer.d_out
        if captured.loss is not None:  # tables that map to them are no modules
            total = max(total, captured.loss.outputs.nbytes)
        return total // max(1, captured.num_examples)

    def _choose(self, captured: Captured) -> Fisher:
        if captured.loss is None:
            return "empirical"
        self.columns = captured.loss.num_columns
        if self._fisher is not None:
            return self._fisher
        return "exact" if self.columns <= max(self._max_columns, self._draws) else "mixed"


def _mix(seeds: Iterable[Tensor], weights: Tensor) -> Iterator[Tensor]:
    """Return the sums of seeds, whose first dimension is of examples, with weights ``(K, B, V)``.

    Weights are as many as the longest examples have columns. A batch of shorter ones has fewer seeds.
    """
    examples, count = weights.shape[1:]
    sums: Tensor | float = 0.0
    shape = torch.Size()
    for seed, shares in zip(seeds, weights, strict=False):
        shape, flat = seed.shape, seed.reshape(examples, -1)
        sums = sums + shares.to(flat).T[:, :, None] * flat
    assert isinstance(sums, Tensor)
    return iter(sums.reshape(count, *shape))
