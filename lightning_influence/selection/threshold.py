"""Channels whose score reaches a share of the layer's highest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.selection.base import SelectionRule, Shape, budget, register_rule, spend_on_rows


@dataclass(frozen=True)
class _Threshold(SelectionRule):
    """Rows by score, as many as reach the level and no more than the ratio allows.

    Attributes:
        level: share of the layer's highest score, in (0, 1].

    Raises:
        ValueError: if the level is outside (0, 1].
    """

    level: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.level, bool) or not 0 < self.level <= 1:
            raise ValueError(f"Got level={self.level!r}; accepted are shares of the highest score in (0, 1].")

    def mask(self, scores: Tensor | None, shape: Shape, ratio: float, generator: torch.Generator) -> Tensor:
        """Return the rows at or above the level, the highest first, within the budget."""
        assert scores is not None
        order = scores.argsort(descending=True, stable=True)
        reaching = int((scores >= self.level * scores.max()).sum())
        return spend_on_rows(order[:reaching], shape, budget(shape, ratio))


@register_rule("threshold_outputs")
class ThresholdOutputs(_Threshold):
    """Channels that the examples excite at least ``level`` times as much as the most excited."""

    source = "outputs"


@register_rule("threshold_gradients")
class ThresholdGradients(_Threshold):
    """Channels through which the loss pulls at least ``level`` times as much as through the strongest."""

    source = "gradients"
