"""The Gauss-Newton matrix as curvature gradients in memory: products without a pass over the data.

Iterations with hundreds of products, or thousands of minibatch products, spend most of a pass on forward and
backward through the model, at weights that do not change. Where the curvature gradients of all examples fit
into memory, in the factored form that layers record, one pass serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.passes import CurvaturePass
from lightning_influence.model.captured import MAX_COLUMNS, Fisher
from lightning_influence.model.finite import check_finite
from lightning_influence.model.layers.gradients import (
    DenseGradients,
    FactoredGradients,
    LayerGradients,
    compact,
    concatenate,
)
from lightning_influence.model.layers.plan import LayerPlan, Layout
from lightning_influence.model.layers.table_gradients import TableGradients
from lightning_influence.support.errors import NonFiniteError
from lightning_influence.support.long_products import multiply_long

# Chosen by hand: examples whose gradients are formed at once when norms of products are taken.
_EXAMPLES = 64
# Chosen by hand: bytes of inner products with the gradients of some examples that are held at once.
_PRODUCT_BYTES = 2**21


class StoragePass(CurvaturePass):
    """Keeps the curvature gradients of all examples, as long as they stay below a limit.

    Args:
        plan: the covered layers.
        limit: most bytes to keep; beyond, everything is let go, and what is left of the pass does nothing.
        num_examples: how many examples there will be: what cannot fit is given up after the first batch.
        fisher: see :class:`~.passes.CurvaturePass`.
        draws: see there.
        seed: see there.

    Attributes:
        fits: whether everything stayed below the limit, with few enough columns to use each.
    """

    description = "Influence: curvature gradients"

    def __init__(
        self,
        plan: LayerPlan,
        *,
        limit: int,
        num_examples: int,
        fisher: Fisher = "exact",
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(plan, fisher=fisher, draws=draws, seed=seed)
        self.fits = True
        self._plan, self._limit, self._expected = plan, limit, num_examples
        self._parts: list[dict[str, LayerGradients]] = []
        self._indices: list[Tensor] = []
        self._bytes = 0

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Keep one batch."""
        if not self.fits:
            return
        captured = self._capture(module, batch, len(indices))
        if captured.loss is not None and captured.loss.num_columns > MAX_COLUMNS:
            self.fits, self._parts, self._indices = False, [], []
            return
        gradients = self._gradients(captured, indices)
        check_finite(gradients)
        kept: dict[str, LayerGradients] = {name: compact(layer) for name, layer in gradients.items()}
        self._bytes += sum(layer.nbytes for layer in kept.values())
        # Joining the batches takes as much again for a moment.
        expected = 2 * self._bytes * max(1.0, self._expected / self.count.examples)
        if expected > self._limit:
            self.fits, self._parts, self._indices = False, [], []
            return
        self._parts.append(kept)
        self._indices.append(indices)

    def operator(
        self, layout: Layout, everyone: Tensor, all_reduce_sum: Callable[[Tensor], Tensor]
    ) -> StoredGaussNewton:
        """Return the operator on some of the layers; hands over what was kept.

        Args:
            layout: the layers.
            everyone: dataset indices of all examples, of all processes, ``(N,)``.
            all_reduce_sum: sums a tensor over the processes.
        """
        self.count.reduce(all_reduce_sum)
        names = [name for name in layout.shapes if any(name in part for part in self._parts)]
        gradients = {name: self._joined(name) for name in names}
        indices = torch.cat([torch.zeros(0, dtype=torch.int64), *self._indices])
        self._parts = []
        return StoredGaussNewton(layout, gradients, indices, everyone, self.count.mean_weight, all_reduce_sum)

    def _joined(self, name: str) -> LayerGradients:
        """Return a layer's gradients of all batches, zero where it took no part."""
        seeds = max(layer.num_seeds for part in self._parts for layer in part.values())
        like = next(part[name] for part in self._parts if name in part)
        return concatenate([
            _with_seeds(part[name], seeds) if name in part else _with_seeds(like.blank(len(indices)), seeds)
            for part, indices in zip(self._parts, self._indices, strict=True)
        ])


class StoredGaussNewton:
    """``G`` as products with gradients in memory; a :class:`~.operators.LinearOperator`.

    Args:
        layout: the order of flat vectors.
        gradients: this process's curvature gradients by layer, of ``B`` examples.
        indices: their dataset indices, ``(B,)``.
        everyone: the dataset indices of all processes' examples, ``(N,)``.
        mean_weight: mean loss weight of an example.
        all_reduce_sum: sums a tensor over the processes.
    """

    def __init__(
        self,
        layout: Layout,
        gradients: dict[str, LayerGradients],
        indices: Tensor,
        everyone: Tensor,
        mean_weight: float,
        all_reduce_sum: Callable[[Tensor], Tensor],
    ) -> None:
        self.layout, self.mean_weight = layout, mean_weight
        self._gradients, self._all_reduce_sum = gradients, all_reduce_sum
        self._indices, self._everyone = indices, everyone.sort().values  # in no loader's order

    @property
    def numel(self) -> int:
        """``P``."""
        return self.layout.numel

    @property
    def num_examples(self) -> int:
        """``N``."""
        return len(self._everyone)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(layer.nbytes for layer in self._gradients.values())

    def product(self, vectors: Tensor) -> Tensor:
        """Return ``G V`` for ``V (V, P)``.

        Vectors of a higher precision than the gradients are multiplied in theirs: a few examples at a time
        are converted, so that it takes no memory to speak of.

        Raises:
            NonFiniteError: if it is not finite.
        """
        return self._product(vectors, self._gradients, self.num_examples)

    def batch_product(self, vectors: Tensor, count: int, seed: int) -> Tensor:
        """Return ``G_b V`` on a random minibatch of ``count`` examples, the same for the same seed.

        Raises:
            NonFiniteError: if it is not finite.
        """
        if count >= self.num_examples:
            return self.product(vectors)
        generator = torch.Generator().manual_seed(seed)
        chosen = self._everyone[torch.randperm(self.num_examples, generator=generator)[:count]]
        mine = torch.isin(self._indices, chosen).nonzero().flatten()
        few = {name: layer.select(mine.to(vectors.device)) for name, layer in self._gradients.items()}
        return self._product(vectors, few if len(mine) else {}, count)

    def batch_examples(self, count: int, seed: int) -> int:
        """Return the number of examples in the minibatch of this seed."""
        return min(count, self.num_examples)

    def dense(self) -> Tensor:
        """Return ``G``, ``(P, P)``, in float64."""
        matrix = torch.zeros(self.numel, self.numel, dtype=torch.float64)
        for few in self._chunks():
            exact = {name: layer.to(dtype=torch.float64) for name, layer in few.items()}
            rows = self.layout.dense(exact).flatten(0, 1)
            matrix = matrix.to(rows.device) + rows.T @ rows
        return self._all_reduce_sum(matrix) / (self.num_examples * self.mean_weight)

    def trace(self) -> float:
        """Return ``Tr(G)``."""
        total = torch.zeros(1, dtype=torch.float64)
        for layer in self._gradients.values():
            total += layer.sum_of_squares().sum().double().cpu()
        return float(self._all_reduce_sum(total)) / (self.num_examples * self.mean_weight)

    def squared_products(self, vectors: Tensor) -> Tensor:
        """Return ``E[||h_x v||^2]`` of vectors ``(V, P)``, ``h_x`` the curvature of one example, ``(V,)``.

        This is the quadratic form of ``E[h_x^2]``, which is what minibatch noise is made of.
        """
        total = vectors.new_zeros(len(vectors), dtype=torch.float64)
        for few in self._chunks():
            rows = self.layout.dense(few).transpose(0, 1)  # (B, K, P)
            weights = multiply_long(rows, vectors.T)  # (B, K, V)
            gram = multiply_long(rows, rows.mT)  # (B, K, K)
            total += (weights * (gram @ weights)).sum(dim=(0, 1)).double()
        return self._all_reduce_sum(total) / (self.num_examples * self.mean_weight**2)

    def _chunks(self) -> Iterator[dict[str, LayerGradients]]:
        for start in range(0, len(self._indices), _EXAMPLES):
            part = slice(start, start + _EXAMPLES)
            yield {name: layer.select(part) for name, layer in self._gradients.items()}

    def _product(self, vectors: Tensor, gradients: dict[str, LayerGradients], count: int) -> Tensor:
        result = torch.zeros_like(vectors)
        for few in _convert(gradients, vectors):
            self.layout.add_combination(result, few, self.layout.dot(few, vectors))
        result = self._all_reduce_sum(result)
        if not bool(torch.isfinite(result.sum())):
            raise NonFiniteError(
                "A curvature product is not finite: the vectors have grown beyond what their precision "
                "holds, or the curvature is not finite. Raise the damping, or check the training examples "
                "and the weights for NaN or infinity."
            )
        return result / (count * self.mean_weight)


def bound_kappa(squares: Tensor, forms: Tensor, trace: float) -> float:
    """Return ``kappa`` of ``E[h_x^2] <= kappa Tr(H) H``, as far as some directions tell: a lower bound.

    Args:
        squares: ``v^T E[h_x^2] v`` of directions, ``(V,)``, see :meth:`StoredGaussNewton.squared_products`.
        forms: ``v^T H v``, ``(V,)``; directions in which it vanishes say nothing.
        trace: ``Tr(H)``.

    Returns:
        The largest ratio; 1 where there is nothing to tell from.
    """
    kept = forms > 1e-6 * forms.max() if len(forms) else forms > 0
    if not bool(kept.any()) or not trace > 0:
        return 1.0
    return float((squares[kept] / forms[kept]).max()) / trace


def _convert(gradients: dict[str, LayerGradients], vectors: Tensor) -> Iterator[dict[str, LayerGradients]]:
    """Yield gradients in the precision of vectors ``(V, P)``, so few at a time that products take no memory.

    Products are ``(K, B, V)``. Where the precision is another one, few enough are converted, too.
    """
    first = next(iter(gradients.values()), None)
    if first is None:
        return
    step = _PRODUCT_BYTES // max(1, vectors[:, :1].nbytes * first.num_seeds)
    step = max(1, step if first.like.dtype == vectors.dtype else min(step, _EXAMPLES))
    for start in range(0, first.num_examples, step):
        part = slice(start, start + step)
        yield {name: layer.select(part).to(dtype=vectors.dtype) for name, layer in gradients.items()}


def _with_seeds(gradients: LayerGradients, count: int) -> LayerGradients:
    """Return gradients with as many seeds, those that are added being zero."""
    missing = count - gradients.num_seeds

    def add(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

    if not missing:
        return gradients
    if isinstance(gradients, TableGradients):
        products = _with_seeds(gradients.products, count)
        assert isinstance(products, FactoredGradients)
        return TableGradients(gradients.rows, add(gradients.values), products)
    if isinstance(gradients, FactoredGradients):
        return FactoredGradients(gradients.inputs, add(gradients.outputs))
    return DenseGradients(add(gradients.dense()))
