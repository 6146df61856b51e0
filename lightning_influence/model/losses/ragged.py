"""Losses on rows of which examples have different numbers, as where a mask has picked them.

Each row is an example of its own to the loss function. What it knows of the rows is added up by their owners;
outputs are filled up, so that each example has as many rows as that of most, with rows that have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.model.uses.places import gather_plan


@dataclass(frozen=True, eq=False)
class RaggedLoss(OutputLoss):
    """Another loss of single rows, summed over those of each example; ``outputs (B * T, ...)``.

    Attributes:
        rows: the loss of the ``R`` rows, each of which is an example.
        slots: the place of each row among the ``B * T``, ``(R,)``.
    """

    rows: OutputLoss
    slots: Tensor

    @classmethod
    def of(cls, rows: OutputLoss, owners: Tensor, num_examples: int) -> Self:
        """Add up the losses of rows.

        Args:
            rows: the loss, each row an example.
            owners: the example of each row, ``(R,)``.
            num_examples: ``B``.

        Returns:
            The loss of the examples, of which some may have no row.
        """
        index, present = gather_plan(tuple(owners.tolist()), num_examples)
        slots = torch.empty_like(owners)
        slots[index[present]] = present.flatten().nonzero().flatten()
        index, slots = index.flatten().to(rows.outputs.device), slots.to(rows.outputs.device)
        with torch.enable_grad():
            outputs = rows.outputs.index_select(0, index)
        return cls(outputs, rows.targets, num_examples, rows.reduction, rows, slots)

    @property
    def note(self) -> str | None:
        """What is to be told of the loss of rows."""
        return self.rows.note

    @property
    def class_weights(self) -> Tensor | None:
        """Those of the loss of rows, if it has some."""
        return getattr(self.rows, "class_weights", None)

    def per_example(self) -> Tensor:
        """Return the unnormalised loss of each example, ``(B,)``, differentiable in ``outputs``."""
        return self._add_up(self._inner.per_example())

    def weights(self) -> Tensor:
        """Return the sum of the weights of each example's rows, ``(B,)``, where the mean is over rows."""
        return self._add_up(self._inner.weights()) if self.divides_by_positions else self.ones()

    def share(self) -> Tensor:
        """Return the derivative of the batch's loss in the sum of the function's unreduced values."""
        relative = len(self.slots) / self.num_examples if self.reduction == "example_mean" else 1.0
        return self._inner.share() * relative

    def gradient(self) -> Tensor:
        """Return the seed of the training loss, zero at rows that fill up."""
        return self._fill_up(self._inner.gradient())

    @property
    def num_columns(self) -> int:
        """``K``: the columns of as many rows as an example has at most."""
        return self._inner.num_columns * self._most

    def columns(self) -> Iterator[Tensor]:
        """The columns of each example's first row, then those of its second, and so on."""
        ranks = self.slots % self._most
        for rank in range(self._most):
            own = (ranks == rank).nonzero().flatten()
            for column in self._inner.columns():
                yield self._fill_up(torch.zeros_like(column).index_copy(0, own, column[own]))

    def column_energies(self) -> Tensor:
        """Return the squared norm of each column of each example, ``(B, K)``."""
        return self._fill_up(self._inner.column_energies()).reshape(self.num_examples, -1)

    def mix_columns(self, weights: Tensor) -> Tensor:
        """Return the sum of each row's columns, with weights ``(B, K)``."""
        own = weights.reshape(self.num_examples * self._most, -1)[self.slots]
        return self._fill_up(self._inner.mix_columns(own))

    def curvature_products(self, tangents: Tensor) -> Tensor:
        """Return the products of each row with its part of the tangents ``(V, *outputs.shape)``."""
        products = self._inner.curvature_products(tangents[:, self.slots])
        return products.new_zeros(tangents.shape).index_copy(1, self.slots, products)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one random seed, independent in the rows."""
        return self._fill_up(self._inner.sample(generator))

    def true_score(self) -> Tensor:
        """Return the output that belongs to the true label, summed over the example's rows, ``(B,)``."""
        return self._add_up(self._inner.true_score())

    def margin(self) -> Tensor:
        """Return log-odds of the true label, summed over the example's rows, ``(B,)``."""
        return self._add_up(self._inner.margin())

    def weighted(self, coefficients: Tensor) -> Self:
        """Return the loss with its unreduced values weighed, row by row."""
        return replace(self, rows=self.rows.weighted(coefficients))

    @property
    def _most(self) -> int:
        return len(self.outputs) // self.num_examples

    @cached_property
    def _inner(self) -> OutputLoss:
        """The loss of rows at these outputs, under this reduction."""
        with torch.enable_grad():
            own = self.outputs.index_select(0, self.slots)
        return replace(self.rows.with_outputs(own), reduction=self.reduction)

    def _add_up(self, values: Tensor) -> Tensor:
        """Return the sums ``(B,)`` of values of the rows ``(R,)``."""
        return values.new_zeros(self.num_examples).index_add(0, self.slots // self._most, values)

    def _fill_up(self, values: Tensor) -> Tensor:
        """Return values of the rows ``(R, ...)`` with zeros between them, ``(B * T, ...)``."""
        return values.new_zeros(len(self.outputs), *values.shape[1:]).index_copy(0, self.slots, values)
