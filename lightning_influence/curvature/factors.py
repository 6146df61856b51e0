"""Kronecker factors of a model: sums over gradients of each layer, their eigenbases, how they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_influence.model.gradients import DenseGradients, FactoredGradients, LayerGradients
from lightning_influence.support.errors import FactorMismatchError, NonFiniteError
from lightning_influence.support.storage import check_version
from lightning_influence.support.waiting import SummedLater, add_later


@dataclass(frozen=True)
class Eigenbasis:
    """Orthonormal bases of one layer's inputs and output gradients, eigenvectors in columns.

    Attributes:
        q_in: ``(G, D_in, D_in)``.
        q_out: ``(G, D_out, D_out)``.
    """

    q_in: Tensor
    q_out: Tensor

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Eigenbasis:
        """Return the basis on another device or in another precision."""
        return Eigenbasis(self.q_in.to(device, dtype), self.q_out.to(device, dtype))


@dataclass
class LayerStatistics:
    """Raw sums of one layer.

    Attributes:
        inputs: sum of ``abar abar^T``, ``(G, D_in, D_in)``.
        outputs: sum of ``ds ds^T`` over seeds, examples and positions, ``(G, D_out, D_out)``.
        examples: number of examples in both sums.
        positions: number of (example, position) pairs in ``inputs``.
        basis: the basis that ``squares`` is measured in.
        squares: sum over examples and seeds of the squared entries of ``Q_out^T g Q_in``, ``(G, D_out,
            D_in)``.
        squares_examples: number of examples in ``squares``.
    """

    inputs: Tensor
    outputs: Tensor
    examples: float = 0.0
    positions: SummedLater = SummedLater()  # noqa: RUF009
    basis: Eigenbasis | None = None
    squares: Tensor | None = None
    squares_examples: float = 0.0

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> LayerStatistics:
        """Return empty sums for a layer of shape ``(G, D_out, D_in)``."""
        groups, d_out, d_in = shape
        return cls(
            torch.zeros(groups, d_in, d_in, device=device, dtype=dtype),
            torch.zeros(groups, d_out, d_out, device=device, dtype=dtype),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, D_out, D_in)``."""
        return self.inputs.shape[0], self.outputs.shape[-1], self.inputs.shape[-1]

    def add_covariances(self, gradients: FactoredGradients) -> None:
        """Add a batch to ``inputs`` and ``outputs``.

        Gradients that are no products of the two have their second moments over columns and over rows added
        (Gupta et al. 2018, "Shampoo"), the former in units of their squared norm, which ``positions`` counts.
        """
        if gradients.whole:
            columns = gradients.outputs.transpose(0, 1).flatten(1, 2)  # (G, K B, D_in, D_out)
            moments = torch.einsum("gbio,gbjo->gij", columns, columns)
            self.inputs += moments
            self.outputs += torch.einsum("gbio,gbip->gop", columns, columns)
            positions = moments.diagonal(dim1=1, dim2=2).sum().double() / len(moments)
            add_later(self, "positions", positions)
            self.examples += gradients.num_examples
            return
        groups, examples, count, d_in = gradients.inputs.shape
        rows = gradients.inputs.reshape(groups, -1, d_in)
        self.inputs.baddbmm_(rows.transpose(1, 2), rows)
        outputs = gradients.outputs.transpose(0, 1).reshape(groups, -1, gradients.outputs.shape[-1])
        self.outputs.baddbmm_(outputs.transpose(1, 2), outputs)
        self.examples += examples
        self.positions += examples * count

    def add_squares(self, gradients: LayerGradients) -> None:
        """Add a batch to ``squares``, in the current basis (that of the parameters if there is none)."""
        rotated = gradients if self.basis is None else rotate(gradients, self.basis)
        squares = rotated.sum_of_squares()
        self.squares = squares if self.squares is None else self.squares.add_(squares)
        self.squares_examples += gradients.num_examples

    def set_basis(self, basis: Eigenbasis | None) -> None:
        """Start measuring ``squares`` in another basis."""
        self.basis, self.squares, self.squares_examples = basis, None, 0.0

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor], *, covariances: bool) -> None:
        """Sum the covariances, or the squares, over processes.

        Args:
            all_reduce_sum: sums a tensor over the processes.
            covariances: which of the two.
        """
        if covariances:
            self.inputs, self.outputs = all_reduce_sum(self.inputs), all_reduce_sum(self.outputs)
            counts = all_reduce_sum(torch.tensor([self.examples, self.positions], dtype=torch.float64))
            self.examples, self.positions = counts.tolist()
        elif self.squares is not None:
            self.squares = all_reduce_sum(self.squares)
            counts = all_reduce_sum(torch.tensor([self.squares_examples], dtype=torch.float64))
            self.squares_examples = float(counts)

    def covariance_in(self) -> Tensor:
        """Return ``A = E[abar abar^T]``, ``(G, D_in, D_in)``."""
        return self.inputs / (self.positions or 1.0)

    def covariance_out(self) -> Tensor:
        """Return ``S = E[sum_r ds ds^T]``, ``(G, D_out, D_out)``."""
        return self.outputs / max(self.examples, 1.0)

    def second_moment(self) -> Tensor | None:
        """Return ``Lambda``, the mean squares in the basis, ``(G, D_out, D_in)``; None if unknown."""
        return None if self.squares is None else self.squares / self.squares_examples


def rotate(gradients: LayerGradients, basis: Eigenbasis) -> LayerGradients:
    """Return gradients in the eigenbasis, rotating factors or matrices, whichever is cheaper."""
    if isinstance(gradients, FactoredGradients):
        _, _, positions, d_in = gradients.inputs.shape
        seeds, d_out = gradients.outputs.shape[0], gradients.outputs.shape[-1]
        factored, dense = positions * (d_in**2 + seeds * d_out**2), seeds * d_in * d_out * (d_in + d_out)
        if positions > 1 and factored > dense:
            gradients = DenseGradients(gradients.dense())
    return gradients.rotate(basis.q_in, basis.q_out)


def compute_eigenbasis(
    name: str, statistics: LayerStatistics, dtype: torch.dtype = torch.float64
) -> Eigenbasis:
    """Eigenvectors of the two covariances of a layer.

    Args:
        name: the layer's name, for errors.
        statistics: its sums.
        dtype: precision of the decomposition; the result has the precision of the sums.

    Returns:
        The basis.

    Raises:
        NonFiniteError: if a covariance is not finite or cannot be decomposed.
    """
    bases = []
    for side, covariance in (
        ("input", statistics.covariance_in()),
        ("output-gradient", statistics.covariance_out()),
    ):
        if not bool(torch.isfinite(covariance.sum())):
            raise NonFiniteError(
                f"The {side} covariance of layer {name!r} is not finite after {statistics.examples:g} "
                "examples. Look for NaN or infinity in the inputs, the weights or the loss of this layer."
            )
        symmetric = covariance.to(dtype)
        try:
            vectors = torch.linalg.eigh((symmetric + symmetric.mT) / 2).eigenvectors
        except RuntimeError as error:
            raise NonFiniteError(
                f"The {side} covariance of layer {name!r} could not be decomposed ({error}). Its entries "
                f"range to {float(covariance.abs().max()):.3g}: rescale the inputs or leave the layer out "
                "with `layers=`."
            ) from error
        bases.append(vectors.to(covariance.dtype))
    return Eigenbasis(*bases)


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
    weight_sum: SummedLater = SummedLater()  # noqa: RUF009
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


# Multiples of the golden ratio fill the range between 0 and 1 evenly, without repeating.
_GOLDEN = 0.6180339887498949
# Chosen by hand: weights that are converted at once: they stay in a processor's cache.
_AT_ONCE = 2**16


def fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """Return two numbers of every parameter: enough to notice other weights, up to rounding, and cheap.

    They are the norm, and a sum with weights that tell places apart: entries that trade places change it.
    """
    result: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        total = squares = parameter.new_zeros((), dtype=torch.float64)
        parts = torch.split(parameter.detach().flatten(), _AT_ONCE)
        places = torch.arange(len(parts[0]), dtype=torch.float64, device=parameter.device)
        weights = 1 + (places * _GOLDEN) % 1
        for number, part in enumerate(parts):
            values = part.double()
            total = total + (values @ weights[: len(part)]) * (1 + (number * _GOLDEN) % 1)
            squares = squares + values @ values
        result[name] = torch.stack([total, squares.sqrt()])
    return dict(zip(result, _read_rows(list(result.values())), strict=True))


def _read_rows(rows: list[Tensor]) -> list[list[float]]:
    """Return the numbers of tensors of one size, of each device with one wait."""
    found: list[list[float]] = [[]] * len(rows)
    for device in {row.device for row in rows}:
        places = [place for place, row in enumerate(rows) if row.device == device]
        values = torch.stack([rows[place] for place in places]).tolist()
        for place, value in zip(places, values, strict=True):
            found[place] = value
    return found


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
