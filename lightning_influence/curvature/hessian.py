"""Passes for the exact Hessian of the training loss: products on many vectors at once, and the matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.differentiation import Batching, add_hessian_products
from lightning_influence.curvature.passes import AveragingPass
from lightning_influence.curvature.twice_differentiable import differentiable_twice
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.support.long_products import multiply_long
from lightning_influence.support.notes import warn

# Chosen by hand: how asymmetric rounding may make a Hessian, relatively; of half precision nothing is known.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_ASYMMETRIC = (
    "The second derivatives of the training loss are not symmetric, by {share:.1%} of their size: an "
    "operation of the model has wrong ones in torch, or is a `torch.autograd.Function` whose backward pass "
    "is not differentiable itself. Do not rely on answers by the Hessian: take the Gauss-Newton matrix "
    "(method='cg' or 'auto')."
)
# Chosen by hand: rows of the identity that are multiplied by at once; differentiation takes them in chunks.
_ROWS = 1024
# As many vectors of a product show whether the matrix is symmetric; one does not.
_SOME = 4


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
        self._batching = Batching()
        self._sum = torch.zeros_like(vectors)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        with differentiable_twice(module):
            captured = self._capture(module, batch, len(indices))
            add_hessian_products(self._sum, self._plan, captured, self.vectors, batching=self._batching)

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
        products = self._total(self._sum, all_reduce_sum, mean_weight)
        some, found = self.vectors[:_SOME], products[:_SOME]
        sizes = some.norm(dim=1)[:, None] * found.norm(dim=1)
        _check_symmetry(multiply_long(some, found.T), self._plan, sizes)
        return products


class DenseHessianPass(AveragingPass):
    """The Hessian ``(P, P)`` of the average per-example training loss in float64, for small models.

    Args:
        plan: the covered layers.
    """

    description = "Influence: dense Hessian"

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(plan)
        self._plan = plan
        self._batching = Batching()
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
                out = self._sum[start : start + _ROWS]
                add_hessian_products(out, self._plan, captured, rows, batching=self._batching)

    def result(self, all_reduce_sum: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return ``H``, ``(P, P)``: an average over the examples, of all processes if given their sum."""
        if self._sum is None:  # this process had no examples
            self._sum = torch.zeros(self.layout.numel, self.layout.numel, dtype=torch.float64)
        total = self._total(self._sum, all_reduce_sum)
        _check_symmetry(total, self._plan)
        return (total + total.T) / 2


def _check_symmetry(matrix: Tensor, plan: LayerPlan, sizes: Tensor | None = None) -> None:
    """Warn if a Hessian is not symmetric, as none is that autograd has right.

    Args:
        matrix: the Hessian, or products of vectors with it.
        plan: the covered layers.
        sizes: of the vectors whose products the entries are, which tell what rounding makes of them; of a
            matrix that is whole its own size does.
    """
    rounding = _ROUNDING.get(next(iter(plan.layers.values())).dtype)
    if rounding is None:
        return
    gap, size = (matrix - matrix.T).norm(), matrix.norm()
    room = 0.0 if sizes is None else rounding / 100 * float(sizes.norm())
    if float(gap) > rounding * float(size) + room:
        warn(_ASYMMETRIC.format(share=float(gap / size)), "asymmetric Hessian")
