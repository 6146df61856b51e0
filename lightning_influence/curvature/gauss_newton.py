"""Passes over curvature examples: Gauss-Newton products on many vectors at once, and the dense matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError
from lightning_influence.layers import FactoredGradients, LayerPlan
from lightning_influence.layers.layout import Layout
from lightning_influence.passes.captured import Captured, Fisher
from lightning_influence.passes.forward import Forward
from lightning_influence.passes.statistics import label_generator

# Largest block of dense gradients formed at once.
_DENSE_BYTES = 2**28


class _CurvaturePass:
    """What both passes share: exact columns while there are few of them, sampled labels beyond.

    Args:
        plan: the covered layers.
        max_columns: largest ``K`` for which every column of the output curvature is used.
        draws: sampled labels per example when there are more columns than that.
        seed: seed of the sampled labels.
    """

    def __init__(self, plan: LayerPlan, *, max_columns: int = 64, draws: int = 16, seed: int = 0) -> None:
        self.layout = Layout.of(plan.layers)
        self.examples = 0
        self.columns: int | None = None
        self.estimated = False
        self._weight = 0.0
        self.forward = Forward(plan)
        self._max_columns, self._draws, self._seed = max_columns, draws, seed
        self._batches = 0

    @property
    def normaliser(self) -> float:
        """What the summed outer products are to be divided by: examples times their mean weight."""
        return self._weight if self._weight > 0 else float(max(self.examples, 1))

    def _total(self, sums: Tensor, all_reduce_sum: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Average over the examples, of all processes if their sum is given.

        Returns:
            The average.

        Raises:
            NonFiniteError: if an entry is NaN or infinite: one bad batch spoils the sum.
        """
        if all_reduce_sum is not None:
            sums = all_reduce_sum(sums)
            counts = all_reduce_sum(torch.tensor([float(self.examples), self._weight], dtype=torch.float64))
            self.examples, self._weight = int(counts[0]), float(counts[1])
        if not bool(torch.isfinite(sums.sum())):
            raise NonFiniteError(
                "The curvature of the training loss is not finite. Check the training examples and the "
                "model's weights for NaN or infinity."
            )
        return sums / self.normaliser

    def _gradients(self, module: Any, batch: Any, num_examples: int) -> dict[str, FactoredGradients]:
        """Return curvature gradients of one batch, counted."""
        captured = self.forward(module, batch, num_examples)
        fisher = self._choose(captured)
        generator = None
        if captured.loss is not None and fisher == "sampled":
            generator = label_generator(self._seed, self._batches, captured.loss.outputs.device)
        gradients = captured.curvature_gradients(fisher, generator, self._draws)
        self._batches += 1
        self.examples += num_examples
        self._weight += float(captured.weights.sum())
        return gradients

    def _choose(self, captured: Captured) -> Fisher:
        if captured.loss is None:
            self.estimated = True
            return "empirical"
        self.columns = captured.loss.num_columns
        if self.columns <= self._max_columns:
            return "exact"
        self.estimated = True
        return "sampled"


class CurvatureProductPass(_CurvaturePass):
    """``G V`` for flat vectors ``V``, in one pass whatever their number.

    A column costs one product of the layer inputs with the vectors and one back, about ``4 P`` operations a
    vector and example, independent of the number of outputs (Jacobian products through recorded factors, not
    through autograd).

    Args:
        plan: the covered layers.
        vectors: ``(V, P)``.
        description: label of the progress bar.
        max_columns: see :class:`_CurvaturePass`.
        draws: see :class:`_CurvaturePass`.
        seed: see :class:`_CurvaturePass`.
    """

    def __init__(
        self,
        plan: LayerPlan,
        vectors: Tensor,
        *,
        description: str = "Influence: curvature products",
        max_columns: int = 64,
        draws: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(plan, max_columns=max_columns, draws=draws, seed=seed)
        self.description = description
        self.vectors = vectors
        self._sum = torch.zeros_like(vectors)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        gradients = self._gradients(module, batch, len(indices))
        products = self.layout.dot(gradients, self.vectors)
        self.layout.add_combination(self._sum, gradients, products)

    def result(self, all_reduce_sum: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return ``G V``, ``(V, P)``: an average over the examples, of all processes if given their sum."""
        return self._total(self._sum, all_reduce_sum)


class DenseCurvaturePass(_CurvaturePass):
    """The Gauss-Newton matrix ``(P, P)`` in float64, for small models.

    Args:
        plan: the covered layers.
        max_columns: see :class:`_CurvaturePass`; every column is used by default.
        draws: see :class:`_CurvaturePass`.
        seed: see :class:`_CurvaturePass`.
    """

    description = "Influence: dense curvature"

    def __init__(self, plan: LayerPlan, *, max_columns: int = 2**31, draws: int = 16, seed: int = 0) -> None:
        super().__init__(plan, max_columns=max_columns, draws=draws, seed=seed)
        self._sum: Tensor | None = None

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        gradients = self._gradients(module, batch, len(indices))
        seeds = max(layer.outputs.shape[0] for layer in gradients.values())
        step = max(1, _DENSE_BYTES // (8 * len(indices) * self.layout.numel))
        for start in range(0, seeds, step):
            few = {name: layer.seeds(slice(start, start + step)) for name, layer in gradients.items()}
            rows = self.layout.dense(few).flatten(0, 1)
            if self._sum is None:
                self._sum = rows.new_zeros(self.layout.numel, self.layout.numel, dtype=torch.float64)
            self._sum += rows.T @ rows

    def result(self, all_reduce_sum: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return ``G``, ``(P, P)``: an average over the examples, of all processes if given their sum."""
        if self._sum is None:  # this process had no examples
            self._sum = torch.zeros(self.layout.numel, self.layout.numel, dtype=torch.float64)
        return self._total(self._sum, all_reduce_sum)
