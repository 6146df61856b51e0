"""Parameters that the loss itself uses, as outputs that all examples share.

A learned temperature, the weights of several terms, or the variances of a likelihood are no outputs of a
module. Beside the outputs ``f_n`` they are further variables ``p`` of each example's loss ``l_n(f_n, p)``.
The curvature of ``l_n`` in both has the blocks of its second derivatives in ``f_n`` and in ``p``; those that
mix the two are left out, as the Gauss-Newton matrix leaves out what goes with the loss's slopes: for a normal
likelihood their expectation is zero, and with them the blocks of single examples are indefinite.

As all examples share ``p``, only the sum over them of ``d^2 l_n / dp^2`` counts. It is the second derivative
of the batch's loss, and each example takes an equal part in it. So the columns of its square root need not be
had for each example: they are dealt out among the examples, which makes no difference to the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.model.losses.batch import BatchLoss, BatchLossTraits
from lightning_influence.model.losses.combined import SumLoss
from lightning_influence.model.losses.loss import OutputLoss, working
from lightning_influence.model.losses.output_rows import keep_apart
from lightning_influence.model.uses.places import whole

# Chosen by hand: up to so many columns each example has them all, as minibatches and samples would have it.
_FEW_COLUMNS = 16


@dataclass(frozen=True, eq=False)
class SharedLoss(BatchLoss):
    """A batch's loss as a function of one parameter, ``outputs (B, |p|)``, a row of it for each example.

    Attributes:
        rows: the gradient of each example's loss in the parameter, ``(B, |p|)``.
        mean: the mean of the examples' losses, as that of a single one.
    """

    rows: Tensor | None = None
    mean: BatchLoss | None = None

    @classmethod
    def of_parameter(
        cls, parameter: Tensor, spread: Tensor, rows: Tensor, batch_loss: Tensor, traits: BatchLossTraits
    ) -> Self:
        """Describe a batch's loss as a function of a parameter.

        Args:
            parameter: the parameter, which the batch's loss was computed from.
            spread: the parameter, once for each example, ``(B, *shape)``, with its graph.
            rows: the gradients of the examples' losses in it, ``(B, *shape)``.
            batch_loss: a scalar.
            traits: what is known of it; says whether it is a mean.

        Returns:
            The loss.
        """
        count = len(spread)
        with torch.enable_grad():
            flat = spread.reshape(count, -1)
        detached, rows = flat.detach(), rows.reshape(count, -1)
        mean = BatchLoss(
            detached[:1],
            detached[:1],
            1,
            "sum",
            (parameter,),
            batch_loss,
            1.0 if traits.is_mean else 1.0 / count,
            lambda: batch_loss.reshape(1),
            traits,
            None,
            keep_apart([whole(0)]),
        )
        reduction = "example_mean" if traits.is_mean else "sum"
        factor = mean.factor * count
        own = (
            (parameter,),
            batch_loss,
            factor,
            lambda: detached.new_zeros(count),
            traits,
            None,
            keep_apart([None]),
        )
        return cls(flat, detached, count, reduction, *own, rows=rows, mean=mean)  # type: ignore[arg-type]

    def total(self) -> Tensor:
        """Return what the examples' losses change by, a scalar with first derivatives in the parameter."""
        return (self.gradient() * (working(self.outputs) - self.detached)).sum()

    def linear(self) -> Tensor:
        """Return what each example's loss changes by, with the second derivatives of the batch's loss."""
        assert self.mean is not None
        slopes, (parameter,) = self.mean._slopes, self.mean.leaves
        bent, shift = slopes - slopes.detach(), parameter - parameter.detach()
        quadratic = self.mean.factor / 2 * (bent * shift.reshape(1, -1)).sum()
        return (self.gradient() * (working(self.outputs) - self.detached)).sum(1) + quadratic

    def gradient(self) -> Tensor:
        """Return the gradient of each example's loss, ``(B, |p|)``."""
        assert self.rows is not None
        return self.rows.to(self.detached.dtype)

    @property
    def num_columns(self) -> int:
        """``K``: the columns of each example, or those that are dealt out to it."""
        if self._blocks is None or self._count <= _FEW_COLUMNS:
            return super().num_columns
        return -(-self._count // self.num_examples)

    def columns(self) -> Iterator[Tensor]:
        """The columns of each example while there are few, and others dealt out to the examples."""
        few = self._blocks is None or self._count <= _FEW_COLUMNS
        return super().columns() if few else self._deal()

    def column_energies(self) -> Tensor:
        """Return the squared norm of each column of each example, ``(B, K)``."""
        return OutputLoss.column_energies(self)

    def mix_columns(self, weights: Tensor) -> Tensor:
        """Return the sum of columns that are dealt out with weights ``(B, K)``: products of two cancel."""
        if self._blocks is None:
            return super().mix_columns(weights)
        return torch.stack([w[:, None] * seed for w, seed in zip(weights.T, self._deal(), strict=False)]).sum(
            0
        )

    @property
    def _count(self) -> int:
        """Number of all columns."""
        assert self.mean is not None
        return self.mean._roots.shape[1] * self.mean._roots.shape[3]

    def _deal(self) -> Iterator[Tensor]:
        """Yield the columns, each for one of the examples and scaled by the root of their number."""
        assert self.mean is not None
        count, roots = self.num_examples, self.mean._roots[0]
        for start in range(0, self._count, count):
            numbers = torch.arange(start, min(start + count, self._count), device=roots.device)
            blocks, own = numbers // roots.shape[2], numbers % roots.shape[2]
            seed = roots.new_zeros(count, *roots.shape[:2])
            seed[numbers - start, blocks] = count**0.5 * roots[blocks, :, own]
            yield self._join(seed)

    @cached_property
    def _blocks(self) -> Tensor | None:
        assert self.mean is not None
        blocks = self.mean._blocks
        return None if blocks is None else blocks.expand(self.num_examples, *blocks.shape[1:])

    @cached_property
    def _roots(self) -> Tensor:
        """Root of the positive part of the mean of the examples' blocks; each one's gradient without any."""
        assert self.mean is not None
        if self._blocks is None:
            return self.gradient()[:, None, :, None]
        roots = self.mean._roots
        return roots.expand(self.num_examples, *roots.shape[1:])

    @cached_property
    def _places(self) -> Tensor:
        assert self.mean is not None
        return self.mean._places


@dataclass(frozen=True, eq=False)
class JointLoss(SumLoss):
    """A loss of which only values are known, as a function of outputs and of parameters that it uses itself.

    The first term is the loss in the outputs, the others are the same loss in one parameter each.
    """

    @classmethod
    def join(cls, loss: BatchLoss, shared: Sequence[SharedLoss]) -> JointLoss:
        """Return a loss with the parameters that it uses as further outputs."""
        return cls.of((loss, *shared), loss.reduction)

    @property
    def main(self) -> BatchLoss:
        """The loss as a function of the outputs."""
        first = self.terms[0]
        assert isinstance(first, BatchLoss)
        return first

    @property
    def values(self) -> Tensor | None:
        """The loss of each example, with its graph down to the parameters, where the user gives them."""
        return self.main.values

    @property
    def is_function_of_outputs(self) -> bool:
        """Whether the loss can be computed at other outputs: it cannot."""
        return False

    def total(self) -> Tensor:
        """Return the sum of the examples' losses, a scalar with first derivatives in the outputs."""
        if self.values is not None:
            return self.main.total()
        return torch.stack([term.total() for term in self.terms]).sum()

    def per_example(self) -> Tensor:
        """Return the loss of each example, ``(B,)``, with first and second derivatives in the outputs."""
        return self.main.per_example() if self.values is not None else super().per_example()

    def second_order(self) -> Tensor:
        """Return the loss of each example, ``(B,)``, with the derivatives that mix parameters and outputs.

        Slopes keep their graph for that. Each example has an equal part in what is quadratic in parameters.
        """
        if self.values is not None:
            return self.values
        main, total = self.main, self.main.per_example()
        bent = main._slopes - main._slopes.detach()
        total = total + main.factor * (bent * (working(main.outputs) - main.detached)).sum(1)
        for term in self.terms[1:]:
            assert isinstance(term, SharedLoss)
            total = total + term.linear()
        return total

    def batch_value(self) -> Tensor:
        """Return the loss of the batch, a detached scalar."""
        return self.main.batch_value()

    def seed(self) -> tuple[Tensor, Tensor]:
        """Return what a backward pass starts from: the values of the user where there are some."""
        return self.main.seed() if self.values is not None else super().seed()
