"""The curvature of the training loss as an operator on flat vectors, for solvers and the spectrum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_influence.curvature.gauss_newton import CurvatureProductPass, DenseCurvaturePass
from lightning_influence.curvature.hessian import DenseHessianPass, HessianProductPass
from lightning_influence.curvature.passes import AveragingPass
from lightning_influence.model.captured import Fisher
from lightning_influence.model.layers.plan import LayerPlan, Layout
from lightning_influence.support.errors import UnsupportedModelError
from lightning_influence.support.passes import Loader, Passes

# Chosen by hand: 512 MiB of float64.
MAX_PARAMETERS = 8192


class Source(Protocol):
    """What an operator is made from; a method's context is one."""

    @property
    def runner(self) -> Passes:
        """Runs passes."""
        ...

    @property
    def plan(self) -> LayerPlan:
        """The covered layers."""
        ...

    @property
    def train(self) -> Loader:
        """The training examples."""
        ...


class LinearOperator(Protocol):
    """What solvers need: products with all the data, and with minibatches."""

    @property
    def numel(self) -> int:
        """``P``."""
        ...

    @property
    def num_examples(self) -> int:
        """``N``."""
        ...

    def product(self, vectors: Tensor) -> Tensor:
        """``H V`` for ``V (V, P)``."""
        ...

    def batch_product(self, vectors: Tensor, count: int, seed: int) -> Tensor:
        """``H_b V`` on a minibatch ``b`` of ``count`` examples."""
        ...

    def dense(self) -> Tensor:
        """``H``, ``(P, P)``, float64."""
        ...


class CurvatureOperator(ABC):
    """``H`` as products over the training data; every product is one pass whatever the number of vectors.

    Args:
        source: runner, layers and training data. The layers are those of the moment: an operator made before
            layers were left out of the plan keeps the longer vectors.
        mean_weight: mean loss weight of a training example if it is known; measured when first needed if
            None.

    Attributes:
        estimated: whether products so far were with an estimate of the curvature: of sampled or training
            labels, or because the outputs behind the user's ``influence_loss`` are unknown.
    """

    def __init__(self, source: Source, *, mean_weight: float | None = None) -> None:
        self.plan = source.plan
        self.layout = Layout.of(self.plan.layers)
        self._runner, self._train = source.runner, source.train
        self._mean_weight = mean_weight
        self.estimated = False

    @property
    def numel(self) -> int:
        """``P``: length of a flat vector."""
        return self.layout.numel

    @property
    def num_examples(self) -> int:
        """``N``: number of training examples."""
        return self._train.num_examples

    @property
    def mean_weight(self) -> float:
        """Mean loss weight of a training example: 1, but for class weights and ignored positions.

        Measured in one forward pass over the data unless it is known from an earlier pass.
        """
        if self._mean_weight is None:
            one_pass = WeightPass(self.plan)
            self._runner.run(one_pass, self._train)
            self._mean_weight = one_pass.result(self._runner.all_reduce_sum)
        return self._mean_weight

    def product(self, vectors: Tensor) -> Tensor:
        """Return ``H V`` over all training data, for flat vectors ``V (V, P)``.

        Raises:
            ValueError: if the vectors are not ``(V, P)``.
            NonFiniteError: if a product is not finite.
        """
        self._check(vectors)
        one_pass = self._run(self._product_pass(vectors.detach(), 0), self._train)
        result: Tensor = one_pass.result(self._runner.all_reduce_sum)
        self._mean_weight = one_pass.count.mean_weight
        return result

    def batch_product(self, vectors: Tensor, count: int, seed: int) -> Tensor:
        """Return ``H_b V`` on a random minibatch ``b``: ``E[H_b] = H`` over the seeds.

        Args:
            vectors: ``V``, ``(V, P)``.
            count: examples in the minibatch, drawn without replacement; all of them from ``N`` on. Whole
                batches are drawn where only the user's own batches can be collated.
            seed: chooses the minibatch; the same one for the same seed.

        Returns:
            ``(V, P)``.

        Raises:
            ValueError: if the vectors are not ``(V, P)``, or ``count`` is not positive.
            NonFiniteError: if a product is not finite.
        """
        self._check(vectors)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"Got count={count!r}; accepted are positive numbers of examples.")
        # The minibatch's own mean weight in the denominator would bias the product.
        mean_weight = self.mean_weight
        one_pass = self._run(self._product_pass(vectors.detach(), seed), self._train.sample(count, seed))
        result: Tensor = one_pass.result(self._runner.all_reduce_sum, mean_weight)
        return result

    def batch_examples(self, count: int, seed: int) -> int:
        """Return how many examples :meth:`batch_product` takes: ``count``, unless whole batches are drawn."""
        return self._train.sample(count, seed).num_examples

    def dense(self, max_parameters: int = MAX_PARAMETERS) -> Tensor:
        """Return ``H``, ``(P, P)``, in float64, for small models.

        Args:
            max_parameters: largest accepted ``P``.

        Raises:
            UnsupportedModelError: if the matrix would be larger.
        """
        if self.numel > max_parameters:
            raise UnsupportedModelError(
                f"A dense {self.numel:,} x {self.numel:,} matrix takes {8 * self.numel**2 / 2**30:.1f} GiB; "
                f"at most {max_parameters:,} parameters are accepted. Use products, cover fewer layers with "
                "`layers=`, or raise `max_parameters`."
            )
        one_pass = self._run(self._dense_pass(), self._train)
        result: Tensor = one_pass.result(self._runner.all_reduce_sum)
        self._mean_weight = one_pass.count.mean_weight
        return result

    @abstractmethod
    def _product_pass(self, vectors: Tensor, seed: int) -> Any:
        """A pass whose ``result(all_reduce_sum, mean_weight)`` is the average product."""

    @abstractmethod
    def _dense_pass(self) -> Any:
        """A pass whose ``result(all_reduce_sum)`` is the average matrix."""

    def _run(self, one_pass: Any, loader: Loader) -> Any:
        self._runner.run(one_pass, loader)
        self.estimated |= getattr(one_pass, "estimated", False)
        return one_pass

    def _check(self, vectors: Tensor) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.numel or not vectors.is_floating_point():
            raise ValueError(
                f"Got vectors of shape {tuple(vectors.shape)} and {vectors.dtype}; accepted are "
                f"floating-point vectors in rows, (V, {self.numel})."
            )


class Damped:
    """``H + diag(damping)``, as an operator.

    Args:
        operator: ``H``.
        damping: a number, or one for each parameter, ``(P,)``; in the unit of the mean loss's curvature,
            weight decay included.
    """

    def __init__(self, operator: LinearOperator, damping: float | Tensor) -> None:
        self.operator = operator
        self.damping = damping

    @property
    def numel(self) -> int:
        """``P``: length of a flat vector."""
        return self.operator.numel

    @property
    def num_examples(self) -> int:
        """``N``: number of training examples."""
        return self.operator.num_examples

    def product(self, vectors: Tensor) -> Tensor:
        """Return ``(H + damping) V``, for flat vectors ``V (V, P)``."""
        return self.operator.product(vectors) + self.damping * vectors

    def batch_product(self, vectors: Tensor, count: int, seed: int) -> Tensor:
        """Return ``(H_b + damping) V`` on a random minibatch; see :meth:`CurvatureOperator.batch_product`."""
        return self.operator.batch_product(vectors, count, seed) + self.damping * vectors

    def dense(self) -> Tensor:
        """Return ``H + diag(damping)``, ``(P, P)``, in float64."""
        matrix = self.operator.dense()
        diagonal = torch.as_tensor(self.damping, dtype=matrix.dtype, device=matrix.device)
        return matrix + torch.diag(diagonal.expand(len(matrix)))


class WeightPass(AveragingPass):
    """Counts examples and their loss weights: a forward pass and nothing else."""

    description = "Influence: loss weights"

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Count one batch."""
        self._capture(module, batch, len(indices))

    def result(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> float:
        """Return the mean weight over all processes."""
        self.count.reduce(all_reduce_sum)
        return self.count.mean_weight


class HessianOperator(CurvatureOperator):
    """The exact Hessian of the average per-example training loss; it may be indefinite."""

    def _product_pass(self, vectors: Tensor, seed: int) -> HessianProductPass:
        return HessianProductPass(self.plan, vectors)

    def _dense_pass(self) -> DenseHessianPass:
        return DenseHessianPass(self.plan)


class GaussNewtonOperator(CurvatureOperator):
    """The Gauss-Newton matrix of the average per-example training loss, or an estimate of it.

    Args:
        source: runner, layers and training data.
        fisher: ``"exact"`` for the matrix itself, ``"mixed"`` for random mixtures of its columns and
            ``"sampled"`` for labels drawn from the model (both drawn anew for every seed of a minibatch),
            ``"empirical"`` for the training labels (biased).
        draws: mixtures or sampled labels per example.
        mean_weight: see :class:`CurvatureOperator`.
    """

    def __init__(
        self,
        source: Source,
        *,
        fisher: Fisher = "exact",
        draws: int = 1,
        mean_weight: float | None = None,
    ) -> None:
        super().__init__(source, mean_weight=mean_weight)
        self.fisher, self.draws = fisher, draws

    def _product_pass(self, vectors: Tensor, seed: int) -> CurvatureProductPass:
        return CurvatureProductPass(self.plan, vectors, fisher=self.fisher, draws=self.draws, seed=seed)

    def _dense_pass(self) -> DenseCurvaturePass:
        return DenseCurvaturePass(self.plan, fisher=self.fisher, draws=self.draws)
