"""Passes over curvature examples: Gauss-Newton products on many vectors at once, and the dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.base import AveragingPass
from lightning_influence.curvature.differentiation import add_gauss_newton_products, differentiable_twice
from lightning_influence.errors import UnsupportedModelError
from lightning_influence.layers import FactoredGradients, LayerPlan
from lightning_influence.passes.captured import MAX_COLUMNS, RANDOM, Captured, Fisher
from lightning_influence.passes.statistics import draw_generator

# Largest block of dense gradients formed at once.
_DENSE_BYTES = 2**28
# Up to this many columns, and one more for each vector, backward passes take less time than products through
# autograd (examples/benchmarks/products.py: at most twice the better way's).
_FEW_COLUMNS = 6


class CurvaturePass(AveragingPass):
    """What passes over curvature gradients share: which ones, and counting.

    Args:
        plan: the covered layers.
        fisher: which curvature gradients to use; None for exact columns while there are few of them, and
            random mixtures of them beyond (see :mod:`~lightning_influence.losses.mixing`).
        max_columns: largest ``K`` for which every column of the output curvature is used, if ``fisher`` is
            None.
        draws: sampled labels, or mixtures, per example.
        seed: seed of the labels or signs.

    Attributes:
        columns: ``K`` of the last batch; None if the outputs are unknown.
        estimated: whether the result is an estimate, from mixtures, sampled or training labels.
    """

    def __init__(
        self,
        plan: LayerPlan,
        *,
        fisher: Fisher | None = None,
        max_columns: int = 64,
        draws: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(plan)
        self.columns: int | None = None
        self.estimated = False
        self._fisher = fisher
        self._max_columns, self._draws, self._seed = max_columns, draws, seed
        self._batches = 0

    def _gradients(self, captured: Captured) -> dict[str, FactoredGradients]:
        """Return curvature gradients of one batch."""
        fisher = self._choose(captured)
        generator = None
        if captured.loss is not None and fisher in RANDOM:
            generator = draw_generator(self._seed, self._batches, captured.loss.outputs.device)
        self._batches += 1
        self.estimated |= fisher != "exact"
        return captured.curvature_gradients(fisher, generator, self._draws)

    def _choose(self, captured: Captured) -> Fisher:
        if captured.loss is None:
            return "empirical"
        self.columns = captured.loss.num_columns
        if self._fisher is not None:
            return self._fisher
        return "exact" if self.columns <= max(self._max_columns, self._draws) else "mixed"


class CurvatureProductPass(CurvaturePass):
    """``G V`` for flat vectors ``V``, in one pass whatever their number.

    There are two exact ways. By *columns*: one backward pass for each of the ``K`` columns of the output
    curvature, whose recorded factors are contracted with the vectors, which costs about ``4 P`` operations a
    vector and example however many columns there are. By *autograd*: two batched backward passes a vector
    (Schraudolph 2002), however many columns. Without an explicit choice of ``fisher``, columns are used while
    there are few of them and random mixtures of them beyond; with ``fisher="exact"`` the cheaper exact way is
    used.

    Args:
        plan: the covered layers.
        vectors: ``(V, P)``.
        description: label of the progress bar.
        fisher: see :class:`CurvaturePass`.
        max_columns: see :class:`CurvaturePass`.
        draws: see :class:`CurvaturePass`.
        seed: see :class:`CurvaturePass`.
    """

    def __init__(
        self,
        plan: LayerPlan,
        vectors: Tensor,
        *,
        description: str = "Influence: curvature products",
        fisher: Fisher | None = None,
        max_columns: int = 64,
        draws: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(plan, fisher=fisher, max_columns=max_columns, draws=draws, seed=seed)
        self.description = description
        self.vectors = vectors
        self._plan = plan
        self._twice = True
        self._sum = torch.zeros_like(vectors)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        if self._fisher != "exact":
            self._add_by_columns(self._capture(module, batch, len(indices)))
            return
        with differentiable_twice(module):
            captured = self._capture(module, batch, len(indices))
            if not self._autograd_is_cheaper(captured) or not self._tried_autograd(captured):
                self._add_by_columns(captured)

    def _add_by_columns(self, captured: Captured) -> None:
        gradients = self._gradients(captured)
        vectors = self.vectors.to(next(iter(gradients.values())).outputs.dtype)
        products = self.layout.dot(gradients, vectors)
        out = self._sum if vectors.dtype == self._sum.dtype else torch.zeros_like(vectors)
        self.layout.add_combination(out, gradients, products)
        if out is not self._sum:
            self._sum += out

    def _tried_autograd(self, captured: Captured) -> bool:
        """Take the way through autograd.

        Returns:
            Whether it was possible: not for a model without second derivatives.

        Raises:
            UnsupportedModelError: if it has none, and there are too many columns for the other way.
        """
        if not self._twice:
            return False
        try:
            self._add_by_autograd(captured)
        except UnsupportedModelError:  # raised by the first derivative of a gradient: nothing was added
            if self.columns is None or self.columns > MAX_COLUMNS:
                raise
            self._twice = False
        return self._twice

    def _add_by_autograd(self, captured: Captured) -> None:
        add_gauss_newton_products(self._sum, self._plan, captured, self.vectors)

    def _autograd_is_cheaper(self, captured: Captured) -> bool:
        if captured.loss is None:  # the outputs are unknown
            return False
        self.columns = captured.loss.num_columns
        return self.columns > min(MAX_COLUMNS, _FEW_COLUMNS + len(self.vectors))

    def result(
        self,
        all_reduce_sum: Callable[[Tensor], Tensor] | None = None,
        mean_weight: float | None = None,
    ) -> Tensor:
        """Return ``G V``, ``(V, P)``: an average over the examples, of all processes if given their sum.

        Args:
            all_reduce_sum: sums a tensor over the processes.
            mean_weight: mean loss weight of an example; that of the examples seen if None.
        """
        return self._total(self._sum, all_reduce_sum, mean_weight)


class DenseCurvaturePass(CurvaturePass):
    """The Gauss-Newton matrix ``(P, P)`` in float64, for small models.

    Args:
        plan: the covered layers.
        fisher: see :class:`CurvaturePass`.
        max_columns: see :class:`CurvaturePass`; every column is used by default.
        draws: see :class:`CurvaturePass`.
        seed: see :class:`CurvaturePass`.
    """

    description = "Influence: dense curvature"

    def __init__(
        self,
        plan: LayerPlan,
        *,
        fisher: Fisher | None = None,
        max_columns: int = 2**31,
        draws: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(plan, fisher=fisher, max_columns=max_columns, draws=draws, seed=seed)
        self._sum: Tensor | None = None

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        gradients = self._gradients(self._capture(module, batch, len(indices)))
        if self._sum is None:
            like = next(iter(gradients.values())).outputs
            size = self.layout.numel
            self._sum = torch.zeros(size, size, dtype=torch.float64, device=like.device)
        add_gram(self._sum, gradients, self.layout.dense)

    def result(self, all_reduce_sum: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return ``G``, ``(P, P)``: an average over the examples, of all processes if given their sum."""
        if self._sum is None:  # this process had no examples
            self._sum = torch.zeros(self.layout.numel, self.layout.numel, dtype=torch.float64)
        return self._total(self._sum, all_reduce_sum)


def add_gram(
    out: Tensor,
    gradients: Mapping[str, FactoredGradients],
    dense: Callable[[Mapping[str, FactoredGradients]], Tensor],
) -> None:
    """Add the gradients' outer products to ``out (P, P)``, some seeds at a time.

    Args:
        out: changed in place.
        gradients: curvature gradients by layer.
        dense: makes flat vectors ``(K, B, P)`` of them.
    """
    first = next(iter(gradients.values()))
    step = max(1, _DENSE_BYTES // (8 * first.num_examples * len(out)))
    for start in range(0, max(layer.outputs.shape[0] for layer in gradients.values()), step):
        few = {name: layer.seeds(slice(start, start + step)) for name, layer in gradients.items()}
        rows = dense(few).flatten(0, 1)
        out += rows.T @ rows
