"""What all curvature passes share: counting examples, and averaging over those of all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError
from lightning_influence.layers import LayerPlan
from lightning_influence.layers.layout import Layout
from lightning_influence.passes.captured import Captured
from lightning_influence.passes.forward import Forward


class AveragingPass:
    """A pass whose result is a sum over examples divided by what normalises the losses.

    Args:
        plan: the covered layers.

    Attributes:
        layout: the order of flat vectors.
        examples: examples seen, by all processes once the result was asked for.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.layout = Layout.of(plan.layers)
        self.examples = 0
        self._weight = 0.0
        self.forward = Forward(plan)

    @property
    def normaliser(self) -> float:
        """What the sums are to be divided by: examples times their mean weight."""
        return self._weight if self._weight > 0 else float(max(self.examples, 1))

    @property
    def mean_weight(self) -> float:
        """Mean loss weight of the examples seen; 1 before there are any."""
        return self.normaliser / max(self.examples, 1)

    def _capture(self, module: Any, batch: Any, num_examples: int) -> Captured:
        """Return the batch after its forward pass, counted."""
        captured = self.forward(module, batch, num_examples)
        self.examples += num_examples
        self._weight += float(captured.weights.sum())
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
            counts = all_reduce_sum(torch.tensor([float(self.examples), self._weight], dtype=torch.float64))
            self.examples, self._weight = int(counts[0]), float(counts[1])
        if not all(bool(torch.isfinite(part.sum())) for part in sums):
            raise NonFiniteError(
                "The curvature of the training loss is not finite. Check the training examples and the "
                "model's weights for NaN or infinity."
            )
        if mean_weight is not None:
            return [part.div_(mean_weight * max(self.examples, 1)) for part in sums]
        return [part.div_(self.normaliser) for part in sums]
