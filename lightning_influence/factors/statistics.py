"""Sums that Kronecker factors are made of: input and output-gradient covariances and rotated squares.

All state is raw sums and counts, so that it can be added across batches, resumed and reduced across
processes; averages, eigenbases and inverses are derived from it. Conventions (K-FAC for weight sharing in its
"expand" setting, Eschenhagen et al. 2023): ``A`` averages ``abar abar^T`` over examples *and* positions,
``S`` averages over examples the *sum* over positions of ``ds ds^T``, so that ``A (x) S`` has the scale of the
layer's Gauss-Newton block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError
from lightning_influence.layers.dense import DenseGradients
from lightning_influence.layers.factored import FactoredGradients
from lightning_influence.layers.gradients import LayerGradients


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
    positions: float = 0.0
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
        """Add a batch to ``inputs`` and ``outputs``."""
        groups, examples, positions, d_in = gradients.inputs.shape
        rows = gradients.inputs.reshape(groups, -1, d_in)
        self.inputs.baddbmm_(rows.transpose(1, 2), rows)
        outputs = gradients.outputs.transpose(0, 1).reshape(groups, -1, gradients.outputs.shape[-1])
        self.outputs.baddbmm_(outputs.transpose(1, 2), outputs)
        self.examples += examples
        self.positions += examples * positions

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
        return self.inputs / max(self.positions, 1.0)

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


def eigenbasis(name: str, statistics: LayerStatistics, dtype: torch.dtype = torch.float64) -> Eigenbasis:
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
