"""The mean loss of the training data: where it differs, data or model are not what they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.content import SeenData
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import LayerPlan

# Means that differ by less are taken for equal: batches of another size round differently.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-7
_RELATIVE_HALF = 1e-2


class LossPass:
    """Nothing but the losses of the training examples.

    Args:
        plan: the covered layers.
    """

    description = "Influence: losses"

    def __init__(self, plan: LayerPlan) -> None:
        self.forward = Forward(plan)
        self.losses = SeenData()

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        self.losses.read(batch, indices)
        self.losses.add(self.forward(module, batch, len(indices)))


def same_mean(one: float, other: float, dtype: torch.dtype) -> bool:
    """Return whether two mean losses agree, up to the rounding of a model in this precision."""
    relative = _RELATIVE_HALF if dtype in (torch.float16, torch.bfloat16) else _RELATIVE
    return abs(one - other) <= relative * max(abs(one), abs(other)) + _ABSOLUTE
