"""Passes over curvature examples: Gauss-Newton products on many vectors at once, and the dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.differentiation import Batching, add_gauss_newton_products
from lightning_influence.curvature.passes import CurvaturePass
from lightning_influence.curvature.twice_differentiable import differentiable_twice
from lightning_influence.model.captured import MAX_COLUMNS, Captured, Fisher
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.support.errors import UnsupportedModelError

# Chosen by hand: bytes of dense gradients that are formed at once.
_DENSE_BYTES = 2**28
# Up to this many columns, and one more for each vector, backward passes take less time than products through
# autograd (examples/benchmarks/products.py: at most twice the better way's).
_FEW_COLUMNS = 6


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
        vectors: ``(V, P)``, or several such blocks, which are never copied together.
        description: label of the progress bar.
        fisher: see :class:`~.passes.CurvaturePass`.
        max_columns: see :class:`~.passes.CurvaturePass`.
        draws: see :class:`~.passes.CurvaturePass`.
        seed: see :class:`~.passes.CurvaturePass`.
        most_bytes: of the vectors that go through recorded factors at once, which takes twice as much again;
            None for no limit.
    """

    def __init__(
        self,
        plan: LayerPlan,
        vectors: Tensor | Sequence[Tensor],
        *,
        description: str = "Influence: curvature products",
        fisher: Fisher | None = None,
        max_columns: int = 64,
        draws: int = 16,
        seed: int = 0,
        most_bytes: int | None = None,
    ) -> None:
        super().__init__(plan, fisher=fisher, max_columns=max_columns, draws=draws, seed=seed)
        self.description = description
        self.vectors = [vectors] if isinstance(vectors, Tensor) else list(vectors)
        self._twice, self._batching = True, Batching()
        self._sums = [torch.zeros_like(block) for block in self.vectors]
        self._most_bytes = most_bytes

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        if self._fisher != "exact":
            self._add_by_columns(self._capture(module, batch, len(indices)), indices)
            return
        with differentiable_twice(module):
            captured = self._capture(module, batch, len(indices))
            if not self._autograd_is_cheaper(captured) or not self._tried_autograd(captured):
                self._add_by_columns(captured, indices)

    def _add_by_columns(self, captured: Captured, indices: Tensor) -> None:
        for run in self._runs(captured, indices):
            gradients: Mapping[str, LayerGradients] = run
            dtype = next(iter(gradients.values())).like.dtype
            if self._sums[0].dtype == torch.float64 != dtype:  # asked for the residual of what is in float32
                dtype = torch.float64
                gradients = {name: layer.to(dtype=dtype) for name, layer in gradients.items()}
            for parts in self._parts():
                self._add_products(gradients, dtype, parts)
            del gradients, run  # before the next ones are made

    def _parts(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield rows of the vectors and of their sums, as many as may be multiplied at once."""
        pairs = zip(self.vectors, self._sums, strict=True)
        if self._most_bytes is None or sum(block.nbytes for block in self.vectors) <= self._most_bytes:
            yield list(pairs)
            return
        for block, out in pairs:
            rows = max(1, self._most_bytes // (self.layout.numel * block.element_size()))
            for few in zip(torch.split(block, rows), torch.split(out, rows), strict=True):
                yield [few]

    def _add_products(
        self,
        gradients: Mapping[str, LayerGradients],
        dtype: torch.dtype,
        parts: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """Add what some gradients contribute to the products with some of the vectors."""
        views = [self.layout.split(block) for block, _ in parts]
        products = torch.stack([
            layer.dot(torch.cat([view[name] for view in views]).to(dtype))
            for name, layer in gradients.items()
        ]).sum(dim=0)
        start = 0
        for name, numel in self.layout.numels.items():
            if name in gradients:
                found = gradients[name].combine(products).flatten(1)
                for (_, out), share in zip(
                    parts, torch.split(found, [len(o) for _, o in parts]), strict=True
                ):
                    out[:, start : start + numel] += share
            start += numel

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
        for out, block in zip(self._sums, self.vectors, strict=True):
            add_gauss_newton_products(out, self._plan, captured, block, batching=self._batching)

    def _autograd_is_cheaper(self, captured: Captured) -> bool:
        if captured.loss is None:  # the outputs are unknown
            return False
        self.columns = captured.loss.num_columns
        return self.columns > min(MAX_COLUMNS, _FEW_COLUMNS + sum(map(len, self.vectors)))

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
        parts = self.results(all_reduce_sum, mean_weight)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def results(
        self,
        all_reduce_sum: Callable[[Tensor], Tensor] | None = None,
        mean_weight: float | None = None,
    ) -> list[Tensor]:
        """Return the products of each block of vectors, in the memory that their sums were made in.

        Args:
            all_reduce_sum: see :meth:`result`.
            mean_weight: see :meth:`result`.
        """
        sums, self._sums = self._sums, []
        return self._totals(sums, all_reduce_sum, mean_weight)


class DenseCurvaturePass(CurvaturePass):
    """The Gauss-Newton matrix ``(P, P)`` in float64, for small models.

    Args:
        plan: the covered layers.
        fisher: see :class:`~.passes.CurvaturePass`.
        max_columns: see :class:`~.passes.CurvaturePass`; every column is used by default.
        draws: see :class:`~.passes.CurvaturePass`.
        seed: see :class:`~.passes.CurvaturePass`.
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
        gradients = self._gradients(self._capture(module, batch, len(indices)), indices)
        if self._sum is None:
            like = next(iter(gradients.values())).like
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
    gradients: Mapping[str, LayerGradients],
    dense: Callable[[Mapping[str, LayerGradients]], Tensor],
) -> None:
    """Add the gradients' outer products to ``out (P, P)``, some seeds at a time.

    Args:
        out: changed in place.
        gradients: curvature gradients by layer.
        dense: makes flat vectors ``(K, B, P)`` of them.
    """
    first = next(iter(gradients.values()))
    step = max(1, _DENSE_BYTES // (8 * first.num_examples * len(out)))
    for start in range(0, max(layer.num_seeds for layer in gradients.values()), step):
        few = {name: layer.seeds(slice(start, start + step)) for name, layer in gradients.items()}
        rows = dense(few).flatten(0, 1)
        out += rows.T @ rows
