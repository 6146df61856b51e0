"""Kronecker factors of a model: sums over gradients of each layer, their eigenbases, how they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_influence.model.layers.bases import Basis
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, LayerGradients
from lightning_influence.model.layers.table_gradients import TableGradients
from lightning_influence.support.coordinates import to_coordinates
from lightning_influence.support.errors import FactorMismatchError
from lightning_influence.support.storage import check_version
from lightning_influence.support.waiting import SummedLater, add_later
from lightning_influence.support.whole import read_whole

#: What of the factors is summed: first the covariances, then squares in their eigenbases.
Phase = Literal["covariances", "squares"]
#: Examples that covariances should stand for, if there are so many, and eigenvalues for half of them. A fit
#: collects as many if it can; answers note where it could not. Chosen by hand: with one draw an example,
#: scores from a second pass over 512 differ about as much from those of the first as scores from the fit do.
ENOUGH_EXAMPLES = 500
# Wide sums are added to block by block, in their upper triangle alone. Chosen by hand: eight blocks a side
# take two thirds of the time of the whole product from 576 columns on, and more of them hardly less.
_BLOCKED, _BLOCKS = 512, 8
# Columns of a batch are picked for its covariance if the others, all zero, leave at most such a part of them.
_FEW = 2


@dataclass(frozen=True)
class Eigenbasis:
    """Orthonormal bases of one layer's inputs and output gradients.

    Attributes:
        inputs: of the ``D_in`` columns; None for the identity, where only a diagonal is held of that side.
        outputs: of the ``D_out`` rows; None as well.
    """

    inputs: Basis | None = None
    outputs: Basis | None = None

    @classmethod
    def of_vectors(cls, q_in: Tensor | None, q_out: Tensor | None) -> Eigenbasis:
        """Return the basis of eigenvectors in columns, ``(G, D_in, D_in)`` and ``(G, D_out, D_out)``."""
        return cls(*(None if q is None else Basis(q) for q in (q_in, q_out)))

    @property
    def q_in(self) -> Tensor | None:
        """Eigenvectors of the inputs' side in columns, ``(G, D_in, D_in)``; formed if they are not held."""
        return None if self.inputs is None else self.inputs.whole()

    @property
    def q_out(self) -> Tensor | None:
        """Those of the outputs' side, ``(G, D_out, D_out)``."""
        return None if self.outputs is None else self.outputs.whole()

    @property
    def transposed(self) -> Eigenbasis:
        """The way back."""
        return Eigenbasis(*(None if side is None else side.mT for side in (self.inputs, self.outputs)))

    @property
    def is_whole(self) -> bool:
        """Whether both sides have a basis."""
        return self.inputs is not None and self.outputs is not None

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return what :meth:`from_tensors` reads, under names that begin with a prefix."""
        found: dict[str, Tensor] = {}
        for name, side in (("in", self.inputs), ("out", self.outputs)):
            if side is not None:
                found[f"{prefix}q_{name}"] = side.vectors
                if side.seen is not None:
                    found[f"{prefix}seen_{name}"] = side.seen
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any], prefix: str = "") -> Eigenbasis | None:
        """Return the basis that a mapping holds, None if it holds none."""
        sides = []
        for name in ("in", "out"):
            vectors, seen = (tensors.get(f"{prefix}{key}_{name}") for key in ("q", "seen"))
            sides.append(None if vectors is None else Basis.of_seen(vectors, seen))
        return None if sides == [None, None] else cls(*sides)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Eigenbasis:
        """Return the basis on another device or in another precision."""
        sides = (self.inputs, self.outputs)
        return Eigenbasis(*(None if side is None else side.to(device, dtype) for side in sides))


@dataclass
class LayerStatistics:
    """Raw sums of one layer.

    Attributes:
        inputs: sum of ``abar abar^T``, ``(G, D_in, D_in)``; of a wide side its diagonal ``(G, D_in)`` alone.
            The upper triangle counts: :meth:`covariance_in` and :meth:`covariance_out` mirror it.
        outputs: sum of ``ds ds^T`` over seeds, examples and positions, ``(G, D_out, D_out)``, or its diagonal
            ``(G, D_out)``.
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
        diagonal: tuple[bool, bool] = (False, False),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> LayerStatistics:
        """Return empty sums.

        Args:
            shape: ``(G, D_out, D_in)`` of the layer.
            diagonal: whether to hold only the diagonal of the outputs' side, and of the inputs'.
            device: of the sums.
            dtype: their precision.
        """
        groups, *widths = shape
        outputs, inputs = (
            torch.zeros(groups, *([width] if narrow else [width, width]), device=device, dtype=dtype)
            for width, narrow in zip(widths, diagonal, strict=True)
        )
        return cls(inputs, outputs)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, D_out, D_in)``."""
        return self.inputs.shape[0], self.outputs.shape[-1], self.inputs.shape[-1]

    def add_covariances(self, gradients: LayerGradients) -> None:
        """Add a batch to ``inputs`` and ``outputs``.

        Gradients that are no products of the two have their second moments over columns and over rows added
        (Gupta et al. 2018, "Shampoo"), the former in units of their squared norm, which ``positions`` counts.
        So have those of large tables, position by position.
        """
        self.examples += gradients.num_examples
        if isinstance(gradients, TableGradients):
            is_large = self.outputs.ndim == 2
            moments = gradients.second_moments() if is_large else gradients.whole_moments()
            if moments is not None:
                inputs, outputs, energy = moments
                self.inputs += inputs if self.inputs.ndim == 3 else inputs.diagonal(dim1=1, dim2=2)
                self.outputs += outputs
                add_later(self, "positions", energy)
                return
        if isinstance(gradients, FactoredGradients):
            groups, examples, positions, d_in = gradients.inputs.shape
            outputs = gradients.outputs.transpose(0, 1)
            self.add_rows(
                gradients.inputs.reshape(groups, -1, d_in),
                outputs.reshape(groups, -1, outputs.shape[-1]),
                0,  # they are counted above
                examples * positions,
            )
            return
        matrices = gradients.dense().flatten(0, 1).transpose(0, 1)  # (G, K B, D_out, D_in)
        _add_moments(self.inputs, matrices.flatten(1, 2))
        _add_moments(self.outputs, matrices.transpose(2, 3).flatten(1, 2))
        add_later(self, "positions", matrices.square().sum().double() / len(matrices))

    def add_rows(self, inputs: Tensor, outputs: Tensor, examples: float, positions: float) -> None:
        """Add the second moments of rows to ``inputs`` and ``outputs``.

        Args:
            inputs: ``(G, n, D_in)``.
            outputs: ``(G, m, D_out)``.
            examples: how many examples they stand for.
            positions: how many (example, position) pairs the inputs stand for.
        """
        _add_moments(self.inputs, inputs)
        _add_moments(self.outputs, outputs)
        self.examples += examples
        self.positions += positions

    def add_squares(self, gradients: LayerGradients, examples: int | None = None) -> None:
        """Add a batch to ``squares``, in the current basis (that of the parameters if there is none).

        Args:
            gradients: of the batch.
            examples: how many examples they stand for, if that is not how many they are.
        """
        rotated = gradients if self.basis is None else rotate(gradients, self.basis)
        squares = rotated.sum_of_squares()
        self.squares = squares if self.squares is None else self.squares.add_(squares)
        self.squares_examples += gradients.num_examples if examples is None else examples

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

    def covariance_in(self, columns: Tensor | None = None) -> Tensor:
        """Return ``A = E[abar abar^T]``, ``(G, D_in, D_in)``, or its diagonal ``(G, D_in)``.

        Args:
            columns: a mask ``(D_in,)`` of those that the answer has; None for all.
        """
        return _average(self.inputs, self.positions or 1.0, columns)

    def covariance_out(self, columns: Tensor | None = None) -> Tensor:
        """Return ``S = E[sum_r ds ds^T]``, ``(G, D_out, D_out)``, or its diagonal ``(G, D_out)``.

        Args:
            columns: a mask ``(D_out,)`` of those that the answer has; None for all.
        """
        return _average(self.outputs, max(self.examples, 1.0), columns)

    def second_moment(self) -> Tensor | None:
        """Return ``Lambda``, the mean squares in the basis, ``(G, D_out, D_in)``; None if unknown."""
        return None if self.squares is None else self.squares / self.squares_examples


def _add_moments(total: Tensor, rows: Tensor) -> None:
    """Add the sum of ``r r^T`` over rows ``(G, N, D)`` to ``(G, D, D)``, or its diagonal to ``(G, D)``."""
    if total.ndim == 2:
        total += rows.square().sum(1)
        return
    width = total.shape[-1]
    # On an accelerator asking would wait for it, and products take little.
    if width >= _BLOCKED and len(total) == 1 and rows.device.type == "cpu":
        seen = rows[0].abs().sum(dim=0).nonzero().flatten()
        if not len(seen):  # a layer behind dead units, or of examples that are fitted to the last bit
            return
        if len(seen) <= width // _FEW:
            part = total.new_zeros(1, len(seen), len(seen))
            _add_moments(part, rows[:, :, seen])
            total[0, seen[:, None], seen] += part[0]
            return
    step = width if width < _BLOCKED else -(-width // _BLOCKS)
    for start in range(0, width, step):  # what is left of the diagonal's blocks is the rest transposed
        block = rows[:, :, start : start + step].transpose(1, 2)
        total[:, start : start + step, start:].baddbmm_(block, rows[:, :, start:])


def _average(sums: Tensor, count: float, columns: Tensor | None) -> Tensor:
    """Return columns of sums ``(G, D, D)``, told by their upper triangle, over a count; or of a diagonal."""
    is_whole = sums.ndim == 2 or sums.shape[-1] < _BLOCKED
    if columns is not None:
        sums = sums[:, columns] if sums.ndim == 2 else sums[:, columns][:, :, columns]
    if is_whole:
        return sums / count
    upper = sums.triu()
    return upper.add_(sums.triu(1).mT).div_(count)


def rotate(gradients: LayerGradients, basis: Eigenbasis) -> LayerGradients:
    """Return gradients in the eigenbasis, rotating factors or matrices, whichever is cheaper."""
    if isinstance(gradients, FactoredGradients):
        positions, seeds = gradients.inputs.shape[2], gradients.num_seeds
        _, d_out, d_in = gradients.shape
        sides = basis.inputs, basis.outputs
        wide_in, wide_out = (0 if side is None else side.vectors.shape[-1] for side in sides)
        factored = positions * (wide_in**2 + seeds * wide_out**2)
        if positions > 1 and factored > seeds * (d_out * wide_in**2 + d_in * wide_out**2):
            gradients = DenseGradients(gradients.dense())
    return gradients.rotate(basis.inputs, basis.outputs)


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

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None)

        return Factors.from_state_dict({key: move(value) for key, value in self.state_dict().items()})

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
                state |= layer.basis.tensors(f"{name}/")
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
    return LayerStatistics(
        inputs=state[f"{name}/inputs"],
        outputs=state[f"{name}/outputs"],
        examples=examples,
        positions=positions,
        basis=Eigenbasis.from_tensors(state, f"{name}/"),
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
        values = to_coordinates(read_whole(parameter).detach())
        total = squares = values.new_zeros((), dtype=torch.float64)
        parts = torch.split(values.flatten(), _AT_ONCE)
        places = torch.arange(len(parts[0]), dtype=torch.float64, device=values.device)
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
