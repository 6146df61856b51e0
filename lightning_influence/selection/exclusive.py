"""Random channels other than the highest: the control that tells choice from number (Lyu et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.selection.base import SelectionRule, Shape, budget, register_rule, spend_on_rows


class _Exclusive(SelectionRule):
    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return random rows without those that the highest rule touches.

        Where the others do not fill the budget (ratios above about one half), the lowest of the highest
        follow, so that the number of parameters stays comparable.
        """
        assert scores is not None
        count = budget(shape, ratio)
        order = scores.argsort(descending=True, stable=True).cpu()
        highest = min(len(order), -(-count // shape[-1]))
        others = order[highest:]
        shuffled = others[torch.randperm(len(others), generator=generator)]
        return spend_on_rows(torch.cat([shuffled, order[:highest].flip(0)]), shape, count)


@register_rule("exclusive_outputs")
class ExclusiveOutputs(_Exclusive):
    """Random channels outside those that the examples excite most."""

    source = "outputs"


@register_rule("exclusive_gradients")
class ExclusiveGradients(_Exclusive):
    """Random channels outside those through which the examples' loss pulls most."""

    source = "gradients"
