"""The channels with the highest scores (Lyu et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.selection.base import SelectionRule, Shape, budget, register_rule, spend_on_rows


class _Highest(SelectionRule):
    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the rows with the highest scores; of equal ones the first."""
        assert scores is not None
        order = scores.argsort(descending=True, stable=True)
        return spend_on_rows(order, shape, budget(shape, ratio))


@register_rule("highest_outputs")
class HighestOutputs(_Highest):
    """The channels that the examples excite most."""

    source = "outputs"


@register_rule("highest_gradients")
class HighestGradients(_Highest):
    """The channels through which the examples' loss pulls most."""

    source = "gradients"
