"""The mean loss of the training data: where it differs, data or model are not what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.captured import Captured
from lightning_influence.model.forward import Forward
from lightning_influence.model.plan import LayerPlan

# Means that differ by less are taken for equal: batches of another size round differently.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-7
_RELATIVE_HALF = 1e-2


@dataclass
class WeightedCount:
    """How many examples a pass has seen, and how much they weigh in the loss.

    Attributes:
        examples: their number.
        weight: the sum of their loss weights: as many, but for class weights and ignored positions.
    """

    examples: int = 0
    weight: float = 0.0

    def add(self, captured: Captured) -> None:
        """Count a batch."""
        self.examples += captured.num_examples
        self.weight += float(captured.weights.sum())

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Count the examples of all processes, given what sums over these."""
        both = all_reduce_sum(torch.tensor([float(self.examples), self.weight], dtype=torch.float64))
        self.examples, self.weight = int(both[0]), float(both[1])

    @property
    def normaliser(self) -> float:
        """What sums over the examples are to be divided by: their number times their mean weight."""
        return self.weight if self.weight > 0 else float(max(self.examples, 1))

    @property
    def mean_weight(self) -> float:
        """``wbar``; 1 before there are any examples, and where all weights are zero."""
        return self.normaliser / max(self.examples, 1)


@dataclass
class LossSum(WeightedCount):
    """The sum of the losses beside the count, which passes that see them anyway take on the way.

    Attributes:
        total: sum of the examples' unnormalised losses.
    """

    total: float = 0.0

    def add(self, captured: Captured) -> None:
        """Add a batch."""
        super().add(captured)
        with torch.no_grad():  # no graph of its own
            self.total += float(captured.total().double())

    def mean(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> float:
        """Return the mean loss over the examples of all processes, given what sums over these."""
        both = all_reduce_sum(torch.tensor([self.total, self.examples], dtype=torch.float64))
        return float(both[0] / both[1].clamp_min(1))


class LossPass:
    """Nothing but the losses of the training examples.

    Args:
        plan: the covered layers.
    """

    description = "Influence: losses"

    def __init__(self, plan: LayerPlan) -> None:
        self.forward = Forward(plan)
        self.losses = LossSum()

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        self.losses.add(self.forward(module, batch, len(indices)))


def same_mean(one: float, other: float, dtype: torch.dtype) -> bool:
    """Return whether two mean losses agree, up to the rounding of a model in this precision."""
    relative = _RELATIVE_HALF if dtype in (torch.float16, torch.bfloat16) else _RELATIVE
    return abs(one - other) <= relative * max(abs(one), abs(other)) + _ABSOLUTE
