"""Random parameters, whatever their channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_influence.selection.base import SelectionRule, Shape, budget, register_rule


@register_rule("random")
class RandomElements(SelectionRule):
    """Parameters drawn uniformly without replacement, layer by layer."""

    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return exactly the budget, drawn at random."""
        chosen = torch.zeros(math.prod(shape), dtype=torch.bool)
        chosen[torch.randperm(len(chosen), generator=generator)[: budget(shape, ratio)]] = True
        return chosen.view(shape)
