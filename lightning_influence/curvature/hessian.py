"""Passes for the exact Hessian of the training loss: products on many vectors at once, and the matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.differentiation import add_hessian_products
from lightning_influence.curvature.passes import AveragingPass
from lightning_influence.curvature.twice_differentiable import differentiable_twice
from lightning_influence.model.layers.plan import LayerPlan

# Chosen by hand: rows of the identity that are multiplied by at once; differentiation takes them in chunks.
_ROWS = 1024


class HessianProductPass(AveragingPass):
    """``H V`` for flat vectors ``V``, ``H`` the Hessian of the average per-example training loss.

    One pass, whatever the number of vectors: backward through the gradient of the batch's loss (Pearlmutter
    1994), batched over the vectors. ``H`` is symmetric and may be indefinite.

    Args:
        plan: the covered layers.
        vectors: ``(V, P)``.
        description: label of the progress bar.
    """

    def __init__(
        self, plan: LayerPlan, vectors: Tensor, *, description: str = "Influence: Hessian products"
    ) -> None:
        super().__init__(plan)
        self.description = description
        self.vectors = vectors
        self._plan = plan
        self._sum = torch.zeros_like(vectors)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        with differentiable_twice(module):
            captured = self._capture(module, batch, len(indices))
            add_hessian_products(self._sum, self._plan, captured, self.vectors)

    def result(
        self,
        all_reduce_sum: Callable[[Tensor], Tensor] | None = None,
        mean_weight: float | None = None,
    ) -> Tensor:
        """Return ``H V``, ``(V, P)``: an average over the examples, of all processes if given their sum.

        Args:
            all_reduce_sum: sums a tensor over the processes.
            mean_weight: mean loss weight of an example; that of the examples seen if None.
        """
        return self._total(self._sum, all_reduce_sum, mean_weight)


class DenseHessianPass(AveragingPass):
    """The Hessian ``(P, P)`` of the average per-example training loss in float64, for small models.

    Args:
        plan: the covered layers.
    """

    description = "Influence: dense Hessian"

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(plan)
        self._plan = plan
        self._sum: Tensor | None = None

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        size = self.layout.numel
        with differentiable_twice(module):
            captured = self._capture(module, batch, len(indices))
            like = captured.per_example().detach()
            if self._sum is None:
                self._sum = torch.zeros(size, size, dtype=torch.float64, device=like.device)
            for start in range(0, size, _ROWS):
                rows = torch.zeros(min(_ROWS, size - start), size, dtype=like.dtype, device=like.device)
                rows.diagonal(start).fill_(1.0)
                add_hessian_products(self._sum[start : start + _ROWS], self._plan, captured, rows)

    def result(self, all_reduce_sum: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return ``H``, ``(P, P)``: an average over the examples, of all processes if given their sum."""
        if self._sum is None:  # this process had no examples
            self._sum = torch.zeros(self.layout.numel, self.layout.numel, dtype=torch.float64)
        total = self._total(self._sum, all_reduce_sum)
        return (total + total.T) / 2
