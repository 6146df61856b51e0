"""What a forward pass measures on queries in place of the loss."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lightning_influence.model.losses.loss import OutputLoss


class Measure(Protocol):
    """A measurement on queries, such as a ``ResolvedMeasurement``."""

    @property
    def needs_loss(self) -> bool:
        """Whether the training loss has to run first."""
        ...

    def __call__(self, module: Any, batch: Any, *, loss: OutputLoss | None, batch_size: int) -> Tensor:
        """Values ``(B,)``, differentiable."""
        ...
