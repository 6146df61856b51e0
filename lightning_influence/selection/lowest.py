"""The channels with the lowest scores: the control of Lyu et al. 2023."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.selection.base import SelectionRule, Shape, budget, register_rule, spend_on_rows


class _Lowest(SelectionRule):
    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the rows with the lowest scores; of equal ones the first."""
        assert scores is not None
        return spend_on_rows(scores.argsort(stable=True), shape, budget(shape, ratio))


@register_rule("lowest_outputs")
class LowestOutputs(_Lowest):
    """The channels that the examples excite least."""

    source = "outputs"


@register_rule("lowest_gradients")
class LowestGradients(_Lowest):
    """The channels through which the examples' loss pulls least."""

    source = "gradients"
