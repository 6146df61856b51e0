"""Where an approximation of the curvature goes wrong: the diagnostics of the ladder of Hessians.

From the Hessian to a diagonal, each step of the ladder drops something: network curvature, cross-layer terms,
eigenvectors, eigenvalues (Hong, Eschenhagen, Mlodozeniec and Turner 2025, "Better Hessians Matter"). The
measures here compare an approximation with what it approximates, as dense symmetric matrices, layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from lightning_influence.model.layers.plan import Layout


def relative_residual(truth: Tensor, approximation: Tensor) -> float:
    """Return ``||T - A||_F / ||T||_F``; infinite for an approximation of zero that is not zero.

    Args:
        truth: ``T``, ``(P, P)``.
        approximation: ``A``, ``(P, P)``.

    Returns:
        0 if they agree, 1 for ``A = 0``.
    """
    _check_pair(truth, approximation)
    return _over(float((truth.double() - approximation.double()).norm()), float(truth.double().norm()))


def off_block_energy(matrix: Tensor, layout: Layout) -> float:
    """Return the share of ``||T||_F^2`` that stands in blocks between different layers.

    Args:
        matrix: ``T``, ``(P, P)``.
        layout: the layers' order.

    Returns:
        Between 0 (block diagonal) and 1. Its square root is the relative residual of the block diagonal.
    """
    _check_layout(matrix, layout)
    total = float(matrix.double().square().sum())
    own = sum(float(block.double().square().sum()) for block in diagonal_blocks(matrix, layout).values())
    return _over(max(0.0, total - own), total)


def eigenvalue_overlap(truth: Tensor, approximation: Tensor) -> float:
    """Return ``1 - ||sort(l_A) - sort(l_T)|| / ||l_T||``: whether the eigenvalues agree, in any basis.

    Args:
        truth: eigenvalues ``l_T``, ``(P,)``, in any order.
        approximation: eigenvalues ``l_A``, ``(P,)``, in any order.

    Returns:
        1 if they are the same numbers; it may be negative.

    Raises:
        ValueError: if these are not as many numbers.
    """
    if truth.ndim != 1 or truth.shape != approximation.shape:
        raise ValueError(
            f"Got eigenvalues of shapes {tuple(truth.shape)} and {tuple(approximation.shape)}; accepted are "
            "two vectors of the same length."
        )
    first, second = truth.double().sort().values, approximation.double().sort().values
    return 1.0 - _over(float((first - second).norm()), float(first.norm()))


def eigenbasis_overlap(truth: Tensor, approximation: Tensor, k: int) -> float:
    """Return ``||V_k^T U_k||_F^2 / k``: the mean squared cosine between two leading eigenspaces.

    Args:
        truth: ``T``, ``(P, P)``.
        approximation: ``A``, ``(P, P)``.
        k: how many leading eigenvectors, by the magnitude of their eigenvalues. A ``k`` that parts equal
            eigenvalues leaves it to chance which of them count.

    Returns:
        1 if the spaces are the same, about ``k / P`` for random ones.
    """
    _check_pair(truth, approximation)
    _check_count(k, len(truth))
    return _overlap(_by_magnitude(truth)[1][:, :k], _by_magnitude(approximation)[1][:, :k])


def diagonal_blocks(matrix: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return each layer's own block ``(P_l, P_l)``.

    Args:
        matrix: ``(P, P)``.
        layout: the layers' order.
    """
    _check_layout(matrix, layout)
    blocks, start = {}, 0
    for name, numel in layout.numels.items():
        blocks[name] = matrix[start : start + numel, start : start + numel]
        start += numel
    return blocks


@dataclass(frozen=True)
class LayerComparison:
    """An approximation of one layer's block against the block.

    Attributes:
        name: the layer.
        numel: ``P_l``.
        k: how many leading eigenvectors were compared.
        residual: see :func:`relative_residual`.
        eigenvalues: see :func:`eigenvalue_overlap`.
        eigenbasis: see :func:`eigenbasis_overlap`.
    """

    name: str
    numel: int
    k: int
    residual: float
    eigenvalues: float
    eigenbasis: float


@dataclass(frozen=True)
class Comparison:
    """An approximation of a curvature against the curvature.

    Attributes:
        layers: each layer's block.
        residual: relative residual of the whole matrix.
        off_block: off-block energy of the truth.
        off_block_approximation: off-block energy of the approximation.
    """

    layers: Sequence[LayerComparison]
    residual: float
    off_block: float
    off_block_approximation: float

    def __rich__(self) -> Table:
        table = Table(
            "layer",
            "parameters",
            "relative residual",
            "eigenvalue overlap",
            "eigenbasis overlap (k)",
            title="Approximation against truth",
            caption=f"Whole matrix: relative residual {self.residual:.3f}; off-block energy "
            f"{self.off_block:.3f} of the truth, {self.off_block_approximation:.3f} of the approximation.",
        )
        for layer in self.layers:
            basis = f"{layer.eigenbasis:.3f} ({layer.k})"
            table.add_row(
                layer.name, f"{layer.numel:,}", f"{layer.residual:.3f}", f"{layer.eigenvalues:.3f}", basis
            )
        return table


def compare(truth: Tensor, approximation: Tensor, layout: Layout, k: int | None = None) -> Comparison:
    """Compare an approximation with what it approximates, as a whole and layer by layer.

    Args:
        truth: ``T``, ``(P, P)``, symmetric: an operator's ``dense()``, for instance.
        approximation: ``A``, ``(P, P)``, symmetric.
        layout: the layers' order.
        k: leading eigenvectors to compare, at most as many as the layer has; a tenth of them if None.

    Returns:
        The comparison, which prints as a table.
    """
    _check_pair(truth, approximation)
    others = diagonal_blocks(approximation, layout)
    layers = []
    for name, block in diagonal_blocks(truth, layout).items():
        count = max(1, len(block) // 10) if k is None else min(k, len(block))
        _check_count(count, len(block))
        values, vectors = _by_magnitude(block)
        other_values, other_vectors = _by_magnitude(others[name])
        layers.append(
            LayerComparison(
                name=name,
                numel=len(block),
                k=count,
                residual=relative_residual(block, others[name]),
                eigenvalues=eigenvalue_overlap(values, other_values),
                eigenbasis=_overlap(vectors[:, :count], other_vectors[:, :count]),
            )
        )
    return Comparison(
        layers=layers,
        residual=relative_residual(truth, approximation),
        off_block=off_block_energy(truth, layout),
        off_block_approximation=off_block_energy(approximation, layout),
    )


def _by_magnitude(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``(P,)`` and eigenvectors in columns, of the largest magnitudes first."""
    values, vectors = torch.linalg.eigh(matrix.double())
    order = values.abs().argsort(descending=True)
    return values[order], vectors[:, order]


def _overlap(first: Tensor, second: Tensor) -> float:
    """Return the mean squared cosine between the spaces of orthonormal columns ``(P, k)``."""
    return float((first.T @ second).square().sum()) / first.shape[1]


def _check_count(k: int, most: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
        raise ValueError(f"Got k={k!r}; accepted are integers from 1 to {most}.")


def _over(part: float, whole: float) -> float:
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else math.inf


def _check_pair(truth: Tensor, approximation: Tensor) -> None:
    square = truth.ndim == 2 and truth.shape[0] == truth.shape[1]
    if not square or truth.shape != approximation.shape:
        raise ValueError(
            f"Got matrices of shapes {tuple(truth.shape)} and {tuple(approximation.shape)}; accepted are two "
            "square matrices of the same size."
        )


def _check_layout(matrix: Tensor, layout: Layout) -> None:
    if matrix.shape != (layout.numel, layout.numel):
        raise ValueError(
            f"Got a matrix of shape {tuple(matrix.shape)} for a layout of {layout.numel} parameters; "
            f"accepted is ({layout.numel}, {layout.numel})."
        )
