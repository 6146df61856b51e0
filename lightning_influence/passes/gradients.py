"""Passes that keep the gradients of a (small) set of examples: queries, and the anchors of a coarse space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError
from lightning_influence.layers import DenseGradients, LayerGradients, LayerPlan
from lightning_influence.layers.factored import concatenate
from lightning_influence.layers.forms import check_finite, compact
from lightning_influence.passes.forward import Forward, Measure


class GradientPass:
    """Collects the gradient of a measurement (the loss if None) on every example of a loader.

    Args:
        plan: the covered layers.
        measure: what to differentiate; None for the training loss.
        description: label of the progress bar.
        dtype: precision the gradients are kept in; that of the model if None.
        only: dataset indices of the examples to keep, ``(M,)``; all of them if None.
    """

    def __init__(
        self,
        plan: LayerPlan,
        measure: Measure | None = None,
        *,
        description: str = "Influence: query gradients",
        dtype: torch.dtype | None = None,
        only: Tensor | None = None,
    ) -> None:
        self.description = description
        self._indices: list[Tensor] = []
        self._dataloaders: list[Tensor] = []
        self._measure = measure
        self._dtype, self._only = dtype, only
        self._parts: list[dict[str, LayerGradients]] = []
        self.forward = Forward(plan)
        self._plan = plan

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Collect one batch.

        Raises:
            NonFiniteError: if a measurement is NaN or infinite.
        """
        captured = self.forward(module, batch, len(indices), self._measure)
        values = captured.per_example()
        if self._measure is None:
            gradients = captured.loss_gradients(keep_graph=False)
        else:
            gradients = captured.gradients_of(values, keep_graph=False)
        if not bool(torch.isfinite(values).all()):
            bad = indices[~torch.isfinite(values).cpu()].tolist()
            raise NonFiniteError(
                f"The measurement is not finite for {len(bad)} examples (dataset indices {bad[:5]}). Check "
                "these examples and the model's weights for NaN or infinity."
            )
        check_finite(gradients)
        if self._only is not None:
            rows = torch.isin(indices, self._only).nonzero().flatten()
            if not len(rows):
                return
            indices = indices[rows]
            gradients = {name: layer.select(rows.to(values.device)) for name, layer in gradients.items()}
        self._parts.append({name: compact(layer).to(dtype=self._dtype) for name, layer in gradients.items()})
        self._indices.append(indices)
        self._dataloaders.append(torch.full_like(indices, dataloader_idx))

    @property
    def gradients(self) -> dict[str, LayerGradients]:
        """Gradients of all examples in the order seen, ``K = 1``, by layer; zero where it took no part."""
        return {name: concatenate(self._blocks(name)) for name in self._names()}

    def collect(self) -> dict[str, LayerGradients]:
        """Return :attr:`gradients` and keep none: never two copies of more than one layer in memory."""
        result: dict[str, LayerGradients] = {}
        for name in self._names():
            result[name] = concatenate(self._blocks(name))
            for part in self._parts:
                part.pop(name, None)
        return result

    def _names(self) -> list[str]:
        return [name for name in self._plan.layers if any(name in part for part in self._parts)]

    def _blocks(self, name: str) -> list[LayerGradients]:
        """Return a layer's gradients batch by batch."""
        shape = self._plan.layers[name].shape
        like = next(part[name] for part in self._parts if name in part).select(slice(0, 0)).dense()
        return [
            part[name] if name in part else DenseGradients(like.new_zeros(1, len(indices), *shape))
            for part, indices in zip(self._parts, self._indices, strict=True)
        ]

    @property
    def indices(self) -> Tensor:
        """Dataset indices in the order seen, ``(Q,)``."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._indices])

    @property
    def dataloaders(self) -> Tensor:
        """Which loader each example is from, ``(Q,)``."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._dataloaders])
