"""What every loss function knows: its per-example values, its curvature, and how to sample labels.

A loss is written ``l_n = ell(f_n, y_n)`` where ``f_n`` are the model's outputs for example ``n``. Everything
here is about ``ell`` as a function of ``f``; the Jacobian of the outputs belongs to the recorder.

Shapes: ``outputs`` is the tensor that the model passed to the loss function. Its first dimension is either
``B`` (examples) or ``B * T`` (examples with their ``T`` positions flattened into the rows, as language models
do); every tensor called a *seed* has the shape of ``outputs`` and is what a backward pass starts from. Seeds
and values are float32 when the outputs are half precision, and have the dtype of the outputs otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError

#: How the batch's loss is formed from the losses of its elements: ``mean``, ``sum`` and ``none`` are torch's
#: own (the plain mean stands for ``none``); ``position_mean`` divides the sum by the number of positions,
#: ignored and weighted ones alike, and ``example_mean`` divides it by the number of examples.
Reduction = Literal["mean", "sum", "none", "position_mean", "example_mean"]


def working(tensor: Tensor) -> Tensor:
    """Return the values in the dtype to compute in: half precision becomes float32, other floats stay."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass(frozen=True, eq=False)
class OutputLoss(ABC):
    """One call of a loss function, with its outputs still attached to the autograd graph.

    The per-example loss is ``l_n = per_example()_n / wbar`` where ``wbar`` is the mean of :meth:`weights`
    over the *dataset*. For a loss without class weights or ignored positions ``wbar`` is 1 for one label per
    example. The curvature columns, the gradient and the samples below are all *before* that division: a loss
    gradient is to be divided by ``wbar``, a curvature seed by its square root.

    Attributes:
        outputs: the model's outputs, shape ``(B, ...)`` or ``(B * T, ...)``.
        targets: what the loss compared them with.
        num_examples: ``B``.
        reduction: how the batch's loss is formed from the examples' losses.
    """

    outputs: Tensor
    targets: Tensor
    num_examples: int
    reduction: Reduction

    @abstractmethod
    def per_example(self) -> Tensor:
        """Unnormalised loss of each example, shape ``(B,)``, differentiable in ``outputs``."""

    @property
    def note(self) -> str | None:
        """What the curvature stands for where it is not the second derivative of the loss, else None."""
        return None

    def second_order(self) -> Tensor:
        """Return :meth:`per_example` where all second derivatives in the parameters count."""
        return self.per_example()

    def weights(self) -> Tensor:
        """Return ones: what a mean reduction divides by, summed over the batch, shape ``(B,)``.

        Losses that leave out positions or weigh them override this.
        """
        return self.ones()

    def total(self) -> Tensor:
        """Return the sum of :meth:`per_example`, a differentiable scalar."""
        return self.per_example().sum()

    def seed(self) -> tuple[Tensor, Tensor]:
        """Return what a backward pass for the examples' gradients starts from, and its seed there."""
        return self.outputs, self.gradient()

    def gradient(self) -> Tensor:
        """Return the seed of the training loss: ``d sum_n per_example()_n / d outputs``, detached.

        Losses with a closed form override this derivative of the values.
        """
        with torch.enable_grad():
            outputs = self.detached.clone().requires_grad_()
            return torch.autograd.grad(self.with_outputs(outputs).total(), outputs)[0]

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """``K``: how many columns the square root of one example's output curvature has."""

    @abstractmethod
    def columns(self) -> Iterator[Tensor]:
        """The ``K`` seeds whose outer products sum to the Hessian of ``per_example()`` in ``outputs``.

        One seed holds the same column for every example of the batch, so the sum is over the columns of one
        example: outer products *between* examples mean nothing.
        """

    def curvature_products(self, tangents: Tensor) -> Tensor:
        """Products of the output Hessian of ``per_example()`` with tangents, example by example.

        Args:
            tangents: ``(V, *outputs.shape)``.

        Returns:
            The products, of the same shape, in the working dtype. Losses with a closed form override this
            sum over all columns.
        """
        tangents = working(tangents)
        flat = tangents.reshape(len(tangents), self.num_examples, -1)
        total = torch.zeros_like(flat)
        for column in self.columns():
            seed = column.reshape(self.num_examples, -1)
            total += seed * (flat * seed).sum(-1, keepdim=True)
        return total.reshape(tangents.shape)

    def column_energies(self) -> Tensor:
        """Return the squared norm of each column of each example, ``(B, K)``."""
        return torch.stack(
            [seed.reshape(self.num_examples, -1).square().sum(1) for seed in self.columns()], 1
        )

    def mix_columns(self, weights: Tensor) -> Tensor:
        """Sum each example's columns with weights of its own.

        Args:
            weights: ``(B, K)``, in the order of :meth:`columns`.

        Returns:
            One seed. Losses with a closed form override this sum.
        """
        total = torch.zeros_like(self.detached).reshape(self.num_examples, -1)
        for k, column in enumerate(self.columns()):
            total += weights[:, k, None] * column.reshape(self.num_examples, -1)
        return total.reshape(self.outputs.shape)

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One random seed ``s``, ``E[s s^T]`` being the curvature: the gradient at labels the model draws."""

    def true_score(self) -> Tensor:
        """Return the output that belongs to the true label, summed over positions, ``(B,)``, differentiable.

        Raises:
            UnsupportedModelError: if the loss has no labels to speak of (regression, soft targets).
        """
        raise UnsupportedModelError(self._no_labels())

    def margin(self) -> Tensor:
        """Return log-odds of the true label, ``log p_y - log(1 - p_y)``, summed over positions, ``(B,)``.

        Raises:
            UnsupportedModelError: if the loss has no labels to speak of (regression, soft targets).
        """
        raise UnsupportedModelError(self._no_labels())

    def _no_labels(self) -> str:
        return (
            f"The training loss ({type(self).__name__}) has no labels, so there is no `margin` or `logit` to "
            "measure. Accepted are `loss` and a callable: measure the loss, or pass a callable that returns "
            "one output per example."
        )

    @property
    def is_function_of_outputs(self) -> bool:
        """Whether :meth:`with_outputs` can be asked for."""
        return True

    def with_outputs(self, outputs: Tensor) -> Self:
        """Return the same loss at other outputs, of the same shape."""
        return replace(self, outputs=outputs)

    def in_order(self, order: Tensor) -> Self:
        """Return the same loss with its rows in another order.

        Args:
            order: numbers of the rows, ``(R,)``; tensors with a row for each of the outputs' go along.
        """
        own = {"outputs": self.outputs, "targets": self.targets}
        for name in (part.name for part in fields(self)):
            value = getattr(self, name)
            by_row = isinstance(value, Tensor) and value.dim() == self.outputs.dim()
            if by_row and len(value) == len(self.outputs):
                own[name] = value
        with torch.enable_grad():
            moved = {name: value[order.to(value.device)] for name, value in own.items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    @cached_property
    def detached(self) -> Tensor:
        """The outputs, detached, in the dtype to compute in."""
        return working(self.outputs.detach())

    @torch.no_grad()
    def batch_value(self) -> Tensor:
        """Return the loss of the batch under ``reduction`` (the mean for ``"none"``), a detached scalar."""
        return self.per_example().sum() / self.weights().sum() * self.scale

    @property
    def scale(self) -> float:
        """Batch loss divided by the average of the per-example losses: ``B`` for sums, else 1."""
        return float(self.num_examples) if self.reduction == "sum" else 1.0

    def share(self) -> Tensor:
        """Return the derivative of the batch's loss in the sum of the loss function's unreduced values."""
        return self.scale / self.weights().sum()

    def weighted(self, coefficients: Tensor) -> OutputLoss:
        """Return the loss with its unreduced values weighed.

        Args:
            coefficients: in the shape of what the function returns under ``reduction="none"``, not negative.

        Raises:
            LossCaptureError: if the curvature is not known then.
        """
        raise LossCaptureError(f"{type(self).__name__} cannot be weighed by position.")

    @property
    def divides_by_positions(self) -> bool:
        """Whether the reduction divides by a count or weight of positions, not by 1 or the examples."""
        return self.reduction in {"mean", "none", "position_mean"}

    def ones(self) -> Tensor:
        """Return ones, shape ``(B,)``, on the device and in the working dtype of the outputs."""
        return torch.ones(self.num_examples, dtype=self.detached.dtype, device=self.detached.device)
