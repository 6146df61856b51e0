"""A pass for the mean loss of the training data, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_influence.model.content import SeenData
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import LayerPlan


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
