"""What half precision makes of an answer: measured in float32 on a few examples, and told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.rounding import EXAMPLES, find_half_precision, take_in_float32


class Rounding:
    """What half precision makes of scores, seen on a few examples of a pass's first batch.

    Args:
        plan: the covered layers.

    Attributes:
        squares: sums of squares over values of these examples: of their differences from values for gradients
            in float32, and of the latter.
        examples: how many were looked at; 0 where the model does not run in float32.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self._plan, self._looked = plan, False
        self.squares, self.examples = (0.0, 0.0), 0

    def look(
        self,
        module: Any,
        batch: Any,
        num_examples: int,
        gradients: Mapping[str, LayerGradients],
        values: Callable[[Mapping[str, LayerGradients]], Tensor],
    ) -> None:
        """Compare the values of the first examples of the first batch, if the model is in half precision.

        Args:
            module: the user's module.
            batch: the batch.
            num_examples: ``B``.
            gradients: of its first examples.
            values: the scores, or whatever else is asked, of gradients, ``(..., B)``.
        """
        if self._looked or find_half_precision(self._plan) is None:
            return
        self._looked = True
        single = take_in_float32(self._plan, module, batch, num_examples)
        if single is None:
            return
        count = min(layer.num_examples for layer in (*gradients.values(), *single.values()))
        few = slice(0, min(count, EXAMPLES))
        rounded, exact = (
            values({name: layer.select(few) for name, layer in part.items()}).double()
            for part in (gradients, single)
        )
        self.squares = float((rounded - exact).square().sum()), float(exact.square().sum())
        self.examples = rounded.shape[-1]

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> tuple[float | None, int]:
        """Return the relative error in norm, None if it is unknown, and the examples of all processes."""
        told = torch.tensor([*self.squares, float(self.examples)], dtype=torch.float64)
        lost, size, examples = all_reduce_sum(told).tolist()
        return (lost / size) ** 0.5 if size > 0 else None, int(examples)
