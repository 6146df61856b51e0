"""Losses made of others: one times a factor, and sums of several terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.model.losses.loss import OutputLoss, Reduction
from lightning_influence.support.errors import UnsupportedModelError

WEIGHTED = (
    "The loss of a batch is a weighted mean of its examples' losses. Weights count as shares of their batch, "
    "so scores depend a little on how examples are batched."
)


@dataclass(frozen=True, eq=False)
class ScaledLoss(OutputLoss):
    """Another loss times a positive factor; weights of the examples are that loss's own unless given.

    Attributes:
        inner: the loss without the factor.
        factor: what to multiply it with.
        weight: of each example; None for the inner loss's own.
        remark: what is to be told of it, or None.
    """

    inner: OutputLoss
    factor: float
    weight: float | None = None
    remark: str | None = None

    @classmethod
    def of(cls, inner: OutputLoss, factor: float, reduction: Reduction = "example_mean") -> Self:
        """Scale the per-example values that a loss has under a reduction.

        Returns:
            The scaled loss. Under the default its mean over examples is the batch's, with weights of 1.

        Raises:
            ValueError: if the factor is not positive.
        """
        if not factor > 0:
            raise ValueError(f"Got factor={factor}; accepted are positive numbers.")
        inner = replace(inner, reduction=reduction)
        return cls(inner.outputs, inner.targets, inner.num_examples, reduction, inner, factor)

    @property
    def note(self) -> str | None:
        """What is to be told of it, and what the inner loss's curvature stands for, if it is no Hessian."""
        return " ".join(text for text in (self.remark, self.inner.note) if text is not None) or None

    def per_example(self) -> Tensor:
        """Return the loss of each example, shape ``(B,)``, differentiable in ``outputs``."""
        return self.inner.per_example() * self.factor

    def weights(self) -> Tensor:
        """Return those of the inner loss, or those given, shape ``(B,)``."""
        return self.inner.weights() if self.weight is None else self.ones() * self.weight

    def gradient(self) -> Tensor:
        """Return the seed of the training loss, times the factor."""
        return self.inner.gradient() * self.factor

    @property
    def num_columns(self) -> int:
        """``K`` of the inner loss."""
        return self.inner.num_columns

    def columns(self) -> Iterator[Tensor]:
        """The inner loss's seeds, times the square root of the factor."""
        for seed in self.inner.columns():
            yield seed * math.sqrt(self.factor)

    def column_energies(self) -> Tensor:
        """Return the inner loss's energies, times the factor."""
        return self.inner.column_energies() * self.factor

    def mix_columns(self, weights: Tensor) -> Tensor:
        """Return the inner loss's mixture, times the square root of the factor."""
        return self.inner.mix_columns(weights) * math.sqrt(self.factor)

    def curvature_products(self, tangents: Tensor) -> Tensor:
        """Return the inner loss's products, times the factor."""
        return self.inner.curvature_products(tangents) * self.factor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one random seed of the inner loss, times the square root of the factor."""
        return self.inner.sample(generator) * math.sqrt(self.factor)

    def true_score(self) -> Tensor:
        """Return the score of the inner loss, shape ``(B,)``: a logit has no loss factor."""
        return self.inner.true_score()

    def margin(self) -> Tensor:
        """Return the margin of the inner loss, shape ``(B,)``: log-odds have no loss factor."""
        return self.inner.margin()

    def with_outputs(self, outputs: Tensor) -> Self:
        """Return the same loss at other outputs."""
        return replace(self, outputs=outputs, inner=self.inner.with_outputs(outputs))


@dataclass(frozen=True, eq=False)
class SumLoss(OutputLoss):
    """A sum of losses, each with its factor inside; examples have weight 1.

    ``outputs (B, d)`` are those of the terms, flattened by example, side by side. The curvature is
    block-diagonal in them, which is the sum of the terms' curvatures in the parameters, also where two terms
    look at one and the same output.

    Attributes:
        terms: the losses, whose per-example values add up.
    """

    terms: tuple[OutputLoss, ...]

    @classmethod
    def of(cls, terms: Sequence[OutputLoss], reduction: Reduction) -> Self:
        """Join losses of the same examples.

        Args:
            terms: the losses; their own reductions count no more.
            reduction: ``example_mean`` where the batch's loss is the mean of the examples', else ``sum``.

        Returns:
            Their sum.
        """
        count = terms[0].num_examples
        with torch.enable_grad():
            outputs = torch.cat([term.outputs.reshape(count, -1) for term in terms], 1)
        return cls(outputs, terms[0].targets, count, reduction, tuple(terms))

    @property
    def note(self) -> str | None:
        """What curvatures of terms stand for, where they are no Hessians."""
        return " ".join(dict.fromkeys(term.note for term in self.terms if term.note is not None)) or None

    def per_example(self) -> Tensor:
        """Return the loss of each example, shape ``(B,)``, differentiable in the terms' outputs."""
        return torch.stack([term.per_example() for term in self.terms]).sum(0)

    def gradient(self) -> Tensor:
        """Return the terms' seeds side by side, ``(B, d)``."""
        return self._join(term.gradient() for term in self.terms)

    @property
    def num_columns(self) -> int:
        """``K``: the columns of all terms."""
        return sum(term.num_columns for term in self.terms)

    def columns(self) -> Iterator[Tensor]:
        """The seeds of each term, zero at the outputs of the others."""
        for number, term in enumerate(self.terms):
            for seed in term.columns():
                yield self._place(number, seed)

    def column_energies(self) -> Tensor:
        """Return the terms' energies side by side, ``(B, K)``."""
        return torch.cat([term.column_energies() for term in self.terms], 1)

    def mix_columns(self, weights: Tensor) -> Tensor:
        """Return the terms' mixtures side by side, ``(B, d)``."""
        shares = torch.split(weights, [term.num_columns for term in self.terms], 1)
        return self._join(term.mix_columns(share) for term, share in zip(self.terms, shares, strict=True))

    def curvature_products(self, tangents: Tensor) -> Tensor:
        """Return the terms' products with their part of the tangents ``(V, B, d)``."""
        parts = torch.split(tangents, self._widths, 2)
        products = [
            term.curvature_products(part.reshape(len(tangents), *term.outputs.shape))
            for term, part in zip(self.terms, parts, strict=True)
        ]
        return torch.cat([p.reshape(len(tangents), self.num_examples, -1) for p in products], 2)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the terms' random seeds side by side; they are independent of each other and of mean 0."""
        return self._join(term.sample(generator) for term in self.terms)

    def true_score(self) -> Tensor:
        """Return the score of the one term that has labels, shape ``(B,)``.

        Raises:
            UnsupportedModelError: if none has labels, or several do.
        """
        return self._of_labels(lambda term: term.true_score())

    def margin(self) -> Tensor:
        """Return the margin of the one term that has labels, shape ``(B,)``.

        Raises:
            UnsupportedModelError: if none has labels, or several do.
        """
        return self._of_labels(lambda term: term.margin())

    def with_outputs(self, outputs: Tensor) -> Self:
        """Return the same loss at other outputs ``(B, d)``."""
        parts = torch.split(outputs, self._widths, 1)
        terms = tuple(
            term.with_outputs(part.reshape(term.outputs.shape))
            for term, part in zip(self.terms, parts, strict=True)
        )
        return replace(self, outputs=outputs, terms=terms)

    def _of_labels(self, measure: Callable[[OutputLoss], Tensor]) -> Tensor:
        found = []
        for term in self.terms:
            try:
                found.append(measure(term))
            except UnsupportedModelError:
                continue
        if len(found) != 1:
            raise UnsupportedModelError(
                f"The training loss has {len(self.terms)} terms, of which {len(found)} have labels. For "
                "`margin` and `logit` one is accepted; measure the loss, or pass a callable."
            )
        return found[0]

    def _join(self, seeds: Iterator[Tensor]) -> Tensor:
        return torch.cat([seed.reshape(self.num_examples, -1) for seed in seeds], 1)

    def _place(self, number: int, seed: Tensor) -> Tensor:
        flat = seed.reshape(self.num_examples, -1)
        start = sum(self._widths[:number])
        result = flat.new_zeros(self.outputs.shape)
        result[:, start : start + flat.shape[1]] = flat
        return result

    @cached_property
    def _widths(self) -> list[int]:
        return [term.outputs.numel() // self.num_examples for term in self.terms]
