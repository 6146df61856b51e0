"""Passes that keep the gradients of a (small) set of examples: queries, and the anchors of a coarse space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError
from lightning_influence.layers import LayerGradients, LayerPlan
from lightning_influence.layers.gradients import concatenate
from lightning_influence.layers.recorder import check_finite, compact
from lightning_influence.passes.forward import Captured, Forward

Measure = Callable[[Any, Any, Captured], Tensor]
"""``(module, batch, captured) -> (B,)``: what is measured on each example, differentiable."""


class GradientPass:
    """Collects the gradient of a measurement (the loss if None) on every example of a loader.

    Args:
        plan: the covered layers.
        measure: what to differentiate; None for the training loss.
        description: label of the progress bar.
        dtype: precision the gradients are kept in; that of the model if None.
    """

    def __init__(
        self,
        plan: LayerPlan,
        measure: Measure | None = None,
        *,
        description: str = "Influence: query gradients",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.description = description
        self.indices: list[Tensor] = []
        self.dataloaders: list[Tensor] = []
        self.values: list[Tensor] = []
        self._measure = measure
        self._dtype = dtype
        self._parts: list[dict[str, LayerGradients]] = []
        self._forward = Forward(plan)
        self._plan = plan

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Collect one batch.

        Raises:
            NonFiniteError: if a measurement is NaN or infinite.
        """
        captured = self._forward(module, batch, len(indices))
        if self._measure is None:
            values, gradients = captured.per_example(), captured.loss_gradients()
        else:
            values = self._measure(module, batch, captured)
            gradients = captured.gradients_of(values)
        if not bool(torch.isfinite(values).all()):
            bad = indices[~torch.isfinite(values).cpu()].tolist()
            raise NonFiniteError(
                f"The measurement is not finite for {len(bad)} examples (dataset indices {bad[:5]}). Check "
                "these examples and the model's weights for NaN or infinity."
            )
        check_finite(gradients)
        self._parts.append({name: compact(layer).to(dtype=self._dtype) for name, layer in gradients.items()})
        self.indices.append(indices)
        self.dataloaders.append(torch.full_like(indices, dataloader_idx))
        self.values.append(values.detach())

    @property
    def gradients(self) -> dict[str, LayerGradients]:
        """Gradients of all examples in the order seen, ``K = 1``, by layer."""
        names = [name for name in self._plan.layers if any(name in part for part in self._parts)]
        missing = [name for name in names if not all(name in part for part in self._parts)]
        if missing:
            raise NotImplementedError(f"layers {missing} take part in some batches only")
        return {name: concatenate([part[name] for part in self._parts]) for name in names}
