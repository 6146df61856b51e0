"""The factors of a whole model: raw sums of every layer, what they belong to, and how they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_influence.errors import FactorMismatchError
from lightning_influence.factors.statistics import Eigenbasis, LayerStatistics
from lightning_influence.factors.versions import check_version

_VERSION = 1


@dataclass
class Factors:
    """Statistics of every covered layer.

    Attributes:
        layers: raw sums by layer name.
        fisher: which output gradients the sums are made of.
        weight_sum: sum of the examples' loss weights.
        weight_examples: number of examples in ``weight_sum``.
        origin: where they come from, ``"fit"`` or ``"pass"``.
        fingerprint: of the weights they were finished at, see :func:`fingerprint`.
    """

    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    fisher: Literal["mixed", "sampled", "exact", "empirical"] = "mixed"
    weight_sum: float = 0.0
    weight_examples: float = 0.0
    origin: Literal["fit", "pass"] = "pass"
    fingerprint: dict[str, list[float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return what they are of; the tensors would fill the screen."""
        count, measured = len(self.layers), "with" if self.has_squares else "without"
        return (
            f"{type(self).__name__}({count} layer{'s' * (count != 1)}, {self.fisher} Fisher, "
            f"{self.weight_examples:g} examples, {measured} eigenvalues, from a {self.origin})"
        )

    @property
    def mean_weight(self) -> float:
        """``wbar``: mean loss weight of an example; curvature sums are to be divided by it."""
        return self.weight_sum / self.weight_examples if self.weight_sum > 0 else 1.0

    @property
    def has_squares(self) -> bool:
        """Whether every layer has its eigenvalues measured."""
        return bool(self.layers) and all(layer.squares is not None for layer in self.layers.values())

    def reduce_counts(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Sum the loss weights over processes, with a function that sums a tensor over them."""
        counts = all_reduce_sum(torch.tensor([self.weight_sum, self.weight_examples], dtype=torch.float64))
        self.weight_sum, self.weight_examples = counts.tolist()

    def check_fits(self, shapes: Mapping[str, tuple[int, int, int]]) -> None:
        """Refuse factors of another model.

        Args:
            shapes: ``(G, D_out, D_in)`` of the model's covered layers.

        Raises:
            FactorMismatchError: listing the layers that differ.
        """
        have = {name: layer.shape for name, layer in self.layers.items()}
        wrong = [
            f"{name}: factors {have.get(name, 'missing')}, model {shapes.get(name, 'missing')}"
            for name in sorted({*have, *shapes})
            if have.get(name) != shapes.get(name)
        ]
        if wrong:
            raise FactorMismatchError(
                f"The factors do not fit the model, as (groups, outputs, inputs): {'; '.join(wrong)}. Use "
                "the factors of this model, or drop them so that they are fitted again."
            )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """Return a copy on another device or in another precision."""
        state = self.state_dict()
        moved = {k: v.to(device, dtype) if isinstance(v, Tensor) else v for k, v in state.items()}
        return Factors.from_state_dict(moved)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives under flat keys; loads with ``weights_only=True``."""
        state: dict[str, Any] = {
            "version": _VERSION,
            "fisher": self.fisher,
            "weight_sum": self.weight_sum,
            "weight_examples": self.weight_examples,
            "origin": self.origin,
            "fingerprint": {name: list(values) for name, values in self.fingerprint.items()},
            "layers": list(self.layers),
        }
        for name, layer in self.layers.items():
            state[f"{name}/counts"] = [layer.examples, layer.positions, layer.squares_examples]
            state[f"{name}/inputs"] = layer.inputs
            state[f"{name}/outputs"] = layer.outputs
            if layer.basis is not None:
                state[f"{name}/q_in"], state[f"{name}/q_out"] = layer.basis.q_in, layer.basis.q_out
            if layer.squares is not None:
                state[f"{name}/squares"] = layer.squares
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Factors:
        """Rebuild factors from :meth:`state_dict`.

        Returns:
            The factors, sharing the tensors of the state.

        Raises:
            FactorMismatchError: if the state was written by an incompatible version.
        """
        check_version(state, _VERSION, subject="Stored factors have", remedy="Fit them again.")
        return cls(
            layers={name: _layer_from_state(state, name) for name in state["layers"]},
            fisher=state["fisher"],
            weight_sum=state["weight_sum"],
            weight_examples=state["weight_examples"],
            origin=state["origin"],
            fingerprint={name: list(values) for name, values in state["fingerprint"].items()},
        )


def _layer_from_state(state: Mapping[str, Any], name: str) -> LayerStatistics:
    examples, positions, squares_examples = state[f"{name}/counts"]
    q_in, q_out = state.get(f"{name}/q_in"), state.get(f"{name}/q_out")
    return LayerStatistics(
        inputs=state[f"{name}/inputs"],
        outputs=state[f"{name}/outputs"],
        examples=examples,
        positions=positions,
        basis=None if q_in is None or q_out is None else Eigenbasis(q_in, q_out),
        squares=state.get(f"{name}/squares"),
        squares_examples=squares_examples,
    )


def fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """Return sum and norm of every parameter: enough to notice other weights, and cheap."""
    result = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().double()
        result[name] = [float(values.sum()), float(values.norm())]
    return result


def fingerprint_differs(
    stored: Mapping[str, list[float]], model: nn.Module | Mapping[str, list[float]]
) -> list[str]:
    """Return names of parameters whose fingerprint is not the stored one (empty if nothing was stored).

    Args:
        stored: an earlier fingerprint.
        model: the model, or its fingerprint.
    """
    if not stored:
        return []
    now = fingerprint(model) if isinstance(model, nn.Module) else model
    return [
        name
        for name in sorted({*stored, *now})
        if name not in stored
        or name not in now
        or any(abs(a - b) > 1e-6 * (1 + abs(a)) for a, b in zip(stored[name], now[name], strict=True))
    ]
