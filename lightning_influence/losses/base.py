"""What every loss function knows: its per-example values, its curvature, and how to sample labels.

A loss is written ``l_n = ell(f_n, y_n)`` where ``f_n`` are the model's outputs for example ``n``. Everything
here is about ``ell`` as a function of ``f``; the Jacobian of the outputs belongs to :mod:`..layers`.

Shapes: ``outputs`` is the tensor that the model passed to the loss function. Its first dimension is either
``B`` (examples) or ``B * T`` (examples with their ``T`` positions flattened into the rows, as language models do);
every tensor called a *seed* has the shape of ``outputs`` and is what a backward pass starts from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class OutputLoss(ABC):
    """One call of a loss function, with its outputs still attached to the autograd graph.

    The per-example loss is ``l_n = per_example()_n / wbar`` where ``wbar`` is the mean of :meth:`weights` over
    the *dataset*. For a loss without class weights or ignored positions ``wbar`` is 1 for one label per example.
    The curvature columns, the gradient and the samples below are all *before* that division: a loss gradient is
    to be divided by ``wbar``, a curvature seed by its square root.

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

    @abstractmethod
    def weights(self) -> Tensor:
        """Total weight of each example, shape ``(B,)``: what a mean reduction divides by, summed over the batch."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """Seed of the training loss: ``d sum_n per_example()_n / d outputs``, detached."""

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """``K``: how many columns the square root of one example's output curvature has."""

    @abstractmethod
    def columns(self) -> Iterator[Tensor]:
        """The ``K`` seeds whose outer products sum to the Hessian of ``per_example()`` in ``outputs``."""

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One random seed ``s`` with ``E[s s^T]`` equal to the Hessian: the gradient at labels the model draws."""

    @abstractmethod
    def batch_value(self) -> Tensor:
        """The loss of the batch under ``reduction`` (the mean for ``"none"``), a detached scalar."""

    @abstractmethod
    def true_score(self) -> Tensor:
        """The output that belongs to the true label, summed over positions, shape ``(B,)``, differentiable.

        Raises:
            UnsupportedModelError: if the loss has no labels to speak of (regression, soft targets).
        """

    @abstractmethod
    def margin(self) -> Tensor:
        """Log-odds of the true label, ``log p_y - log(1 - p_y)``, summed over positions, ``(B,)``, differentiable.

        Raises:
            UnsupportedModelError: if the loss has no labels to speak of (regression, soft targets).
        """

    @property
    def scale(self) -> float:
        """Batch loss divided by the average of the per-example losses: ``B`` for sums, else 1."""
        return float(self.num_examples) if self.reduction == "sum" else 1.0
