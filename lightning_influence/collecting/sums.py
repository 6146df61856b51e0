"""What a fit sums up: statistics of the current window of the run, and of the last finished one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.eigenbases import compute_eigenbasis
from lightning_influence.curvature.factors import Eigenbasis, Factors, LayerStatistics
from lightning_influence.model.layers.layer import Layer

#: Sums a tensor over all processes in place and returns it; every process has to call it.
AllReduce = Callable[[Tensor], Tensor]


@dataclass
class WindowSums:
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
        self.drop_current()

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
            replace = not self.previous.has_squares and _examples(self.current) >= _examples(self.previous)
        if replace:
            self.previous = None

    def fill(self, layers: Mapping[str, Layer]) -> None:
        """Start empty sums for the layers that have none, so that every process has the same ones."""
        for name, layer in layers.items():
            weight = layer.rule.weight(layer.module)
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            if name not in self.current.layers:
                self.current.layers[name] = LayerStatistics.zeros(
                    layer.shape, layer.diagonal_sides, device=weight.device, dtype=dtype
                )

    def set_bases(self, totals: Mapping[str, LayerStatistics]) -> None:
        """Decompose covariances, and measure squares in their eigenbases from here on.

        The decomposition has the precision of the sums. A basis has to be orthonormal and need not be
        accurate: the squares are exact in whatever basis they are measured.

        Args:
            totals: the covariances of each layer; of several processes, those of all of them.

        Raises:
            NonFiniteError: if a covariance cannot be decomposed; no basis is set then.
        """
        bases: dict[str, Eigenbasis] = {}
        for name, layer in totals.items():
            bases[name] = compute_eigenbasis(name, layer, layer.inputs.dtype)
        for name, basis in bases.items():
            self.current.layers[name].set_basis(basis)

    def copy(self) -> WindowSums:
        """Return a copy that can be summed over processes."""
        previous = None if self.previous is None else _copy_factors(self.previous)
        return WindowSums(_copy_factors(self.current), previous)

    def reduce(self, share: AllReduce, world_size: int) -> None:
        """Sum over the processes in place; every process has to call it.

        A process that had to leave out batches may still keep its previous sums where another has dropped
        them. They serve only where all have them, since the others' part of them is gone.
        """
        having = torch.tensor([float(self.previous is not None)])
        if float(share(having)) < world_size:
            self.previous = None
        for factors in (self.current, self.previous):
            if factors is not None:
                _reduce_factors(factors, share)

    def emptied(self) -> WindowSums:
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
        return WindowSums.from_state_dict(state)

    def to(self, device: torch.device) -> WindowSums:
        """Return the sums on another device."""
        previous = None if self.previous is None else self.previous.to(device)
        return WindowSums(self.current.to(device), previous)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives."""
        return {
            "current": self.current.state_dict(),
            "previous": None if self.previous is None else self.previous.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> WindowSums:
        """Rebuild the sums that were saved.

        Returns:
            The sums, sharing the tensors of the state.

        Raises:
            FactorMismatchError: if they were written by an incompatible version.
        """
        previous = state["previous"]
        return cls(
            Factors.from_state_dict(state["current"]),
            None if previous is None else Factors.from_state_dict(previous),
        )


def copy_statistics(layer: LayerStatistics) -> LayerStatistics:
    """Return a copy of a layer's sums; zero squares where there is a basis, since another may have some."""
    squares = None if layer.squares is None else layer.squares.clone()
    if squares is None and layer.basis is not None:
        squares = layer.inputs.new_zeros(layer.shape)
    return LayerStatistics(
        layer.inputs.clone(),
        layer.outputs.clone(),
        layer.examples,
        layer.positions,
        layer.basis,
        squares,
        layer.squares_examples,
    )


def _examples(factors: Factors) -> float:
    """Return the largest number of examples in the covariances of a layer."""
    return max((layer.examples for layer in factors.layers.values()), default=0.0)


def _copy_factors(factors: Factors) -> Factors:
    layers = {name: copy_statistics(layer) for name, layer in factors.layers.items()}
    total = Factors(layers, factors.fisher, factors.weight_sum, factors.weight_examples, factors.origin)
    total.fingerprint = factors.fingerprint
    return total


def _reduce_factors(factors: Factors, share: AllReduce) -> None:
    for layer in factors.layers.values():
        layer.reduce(share, covariances=True)
        layer.reduce(share, covariances=False)
        if not layer.squares_examples:
            layer.squares = None
    factors.reduce_counts(share)
    factors.layers = {name: layer for name, layer in factors.layers.items() if layer.examples}
