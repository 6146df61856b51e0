"""Sums of a current window of a run, and of the last finished one until the current is worth more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.factors import Eigenbasis, Factors, LayerStatistics, eigenbasis
from lightning_influence.model.layers import Layer


@dataclass
class Generations:
    """Factors of successive windows of a run.

    Attributes:
        current: sums of the current window.
        previous: those of the last one, kept until the current ones replace them; None if they did.
    """

    current: Factors = field(default_factory=lambda: Factors(origin="fit"))
    previous: Factors | None = None

    @property
    def best(self) -> Factors:
        """The most recent factors that are complete, or else those there are."""
        return self.current if self.previous is None else self.previous

    def start_window(self) -> None:
        """Begin new sums; the best so far stay available."""
        self.previous = self.best if self.best.layers else None
        self.current = Factors(fisher=self.current.fisher, origin="fit")

    def drop_current(self) -> None:
        """Forget the sums of the current window."""
        self.current = Factors(fisher=self.current.fisher, origin="fit")

    def settle(self, planned_squares: int, taken_squares: int) -> None:
        """Drop the previous factors once the current ones are worth more.

        Args:
            planned_squares: batches whose squares the current window plans to sum.
            taken_squares: how many it has.
        """
        if self.previous is None:
            return
        if self.current.has_squares:
            replace = 2 * taken_squares >= planned_squares
        else:
            replace = not self.previous.has_squares and examples(self.current) >= examples(self.previous)
        if replace:
            self.previous = None

    def fill(self, layers: Mapping[str, Layer]) -> None:
        """Start empty sums for all layers, so that every process has the same ones."""
        for name, layer in layers.items():
            weight = layer.rule.weight(layer.module)
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            if name not in self.current.layers:
                self.current.layers[name] = LayerStatistics.zeros(
                    layer.shape, device=weight.device, dtype=dtype
                )

    def make_bases(self, share: Callable[[Tensor], Tensor] | None = None) -> None:
        """Decompose the current covariances in the precision of the sums.

        A basis has to be orthonormal, and need not be accurate: the squares are exact in whatever basis they
        are measured.

        Args:
            share: sums a tensor over processes in place; all of them then use the basis of the sum.

        Raises:
            NonFiniteError: if a covariance cannot be decomposed; no basis is set then.
        """
        bases: dict[str, Eigenbasis] = {}
        for name, layer in self.current.layers.items():
            total = layer if share is None else reduced(layer, share)
            bases[name] = eigenbasis(name, total, total.inputs.dtype)
        for name, basis in bases.items():
            self.current.layers[name].set_basis(basis)

    def summed(self, share: Callable[[Tensor], Tensor]) -> Generations:
        """Return a copy whose sums run over all processes; every process has to call it."""
        previous = None if self.previous is None else reduced_factors(self.previous, share)
        return Generations(reduced_factors(self.current, share), previous)

    def emptied(self) -> Generations:
        """Return a copy with the same bases and all sums zero."""
        state = self.state_dict()
        for part in (state["current"], state["previous"]):
            for key in part or ():
                if key.endswith(("/inputs", "/outputs", "/squares")):
                    part[key] = torch.zeros_like(part[key])
                elif key.endswith("/counts"):
                    part[key] = [0.0, 0.0, 0.0]
                elif key in {"weight_sum", "weight_examples"}:
                    part[key] = 0.0
        return Generations.from_state_dict(state)

    def to(self, device: torch.device) -> Generations:
        """Return the sums on another device."""
        previous = None if self.previous is None else self.previous.to(device)
        return Generations(self.current.to(device), previous)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives."""
        return {
            "current": self.current.state_dict(),
            "previous": None if self.previous is None else self.previous.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Generations:
        """Return the generations that were saved.

        Raises:
            FactorMismatchError: if they were written by an incompatible version.
        """
        previous = state["previous"]
        return cls(
            Factors.from_state_dict(state["current"]),
            None if previous is None else Factors.from_state_dict(previous),
        )


def examples(factors: Factors) -> float:
    """Return the largest number of examples in the covariances of a layer."""
    return max((layer.examples for layer in factors.layers.values()), default=0.0)


def reduced(layer: LayerStatistics, share: Callable[[Tensor], Tensor]) -> LayerStatistics:
    """Return a copy of a layer's statistics, summed over processes."""
    squares = None if layer.squares is None else layer.squares.clone()
    if squares is None and layer.basis is not None:  # another process may have some
        squares = layer.inputs.new_zeros(layer.shape)
    total = LayerStatistics(
        layer.inputs.clone(),
        layer.outputs.clone(),
        layer.examples,
        layer.positions,
        layer.basis,
        squares,
        layer.squares_examples,
    )
    total.reduce(share, covariances=True)
    total.reduce(share, covariances=False)
    if not total.squares_examples:
        total.squares = None
    return total


def reduced_factors(factors: Factors, share: Callable[[Tensor], Tensor]) -> Factors:
    """Return a copy of factors, summed over processes."""
    layers = {name: reduced(layer, share) for name, layer in factors.layers.items()}
    layers = {name: layer for name, layer in layers.items() if layer.examples}
    total = Factors(layers, factors.fisher, factors.weight_sum, factors.weight_examples, factors.origin)
    total.fingerprint = factors.fingerprint
    total.reduce_counts(share)
    return total
