r"""Segment-wise unrolling of a run (SOURCE: Bae, Lin, Lorraine, Grosse 2024), as functions of matrices.

A run is cut into segments, in each of which the curvature ``H`` (weight decay included) and the gradients
count as constant. A segment of effective length ``T = sum eta / (1 - momentum)`` moves the parameters by ``F
g / N`` where ``F = (1 - exp(-T H)) H^{-1}`` if example ``n`` of gradient ``g`` is left out, and what earlier
segments did to them shrinks by ``S = exp(-T H)``:

.. math:: \tau(q, n) = \frac1N \sum_l \big(F_l S_{l+1} \cdots S_L g_q\big)^T g_n^{(l)}.

One segment, with the curvature and gradients of the end, is an influence function whose ``1 / (h + lambda)``
is replaced by the exponential filter ``(1 - exp(-T h)) / h``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.model.layers.gradients import rotate_matrices
from lightning_influence.model.layers.plan import Layout

Function = Callable[[Tensor], Tensor]


class Curvature(Protocol):
    """A symmetric matrix, of which functions can be applied."""

    def apply(self, function: Function, vectors: Tensor) -> Tensor:
        """Return ``f(G) V`` for flat vectors ``(V, P)``; ``function`` maps eigenvalues to their values."""
        ...


class DenseCurvature:
    """A matrix ``(P, P)``, decomposed once.

    Args:
        matrix: symmetric, positive semidefinite up to rounding.
    """

    def __init__(self, matrix: Tensor) -> None:
        values, self.vectors = torch.linalg.eigh(matrix)
        self.values = values.clamp(min=0)

    def apply(self, function: Function, vectors: Tensor) -> Tensor:
        """Return ``f(G) V``."""
        return ((vectors @ self.vectors) * function(self.values)) @ self.vectors.T


class ProjectedCurvature:
    """A matrix in the subspace of orthonormal rows ``Q (m, P)``: ``f(G) ~ Q^T f(Q G Q^T) Q``.

    Args:
        basis: ``Q``.
        products: ``Q G``, ``(m, P)``.
    """

    def __init__(self, basis: Tensor, products: Tensor) -> None:
        small = products.double() @ basis.double().T
        self._small, self.basis = DenseCurvature((small + small.T) / 2), basis.double()

    def apply(self, function: Function, vectors: Tensor) -> Tensor:
        """Return ``f(G) V`` as far as the subspace goes."""
        return self._small.apply(function, vectors @ self.basis.T) @ self.basis


class FactoredCurvature:
    """One closed-form spectrum a layer, as of EK-FAC.

    Args:
        inverse: whose bases and eigenvalues are used; its damping is not.
    """

    def __init__(self, inverse: BlockInverse) -> None:
        layers = {name: layer.to(dtype=torch.float64) for name, layer in inverse.layers.items()}
        self.inverse = BlockInverse(inverse.layout, layers)

    def apply(self, function: Function, vectors: Tensor) -> Tensor:
        """Return ``f(G) V``, for ``V`` of float64."""
        layout = self.inverse.layout
        blocks = {}
        for name, block in layout.split(vectors).items():
            layer = self.inverse.layers[name]
            assert layer.basis is not None
            scaled = rotate_matrices(block, layer.basis.inputs, layer.basis.outputs)
            back = layer.basis.transposed
            scaled = scaled * function(layer.eigenvalues)
            blocks[name] = rotate_matrices(scaled, back.inputs, back.outputs)
        return layout.join(blocks)


@dataclass(frozen=True)
class Segment:
    """A part of a run.

    Attributes:
        time: ``T``, the sum of effective learning rates.
        decay: weight decay, which is added to the curvature.
        curvature: ``G``, in the unit of the mean loss.
        train: gradients of the training examples, ``(N, P)``.
    """

    time: float
    decay: float
    curvature: Curvature
    train: Tensor

    def response(self, vectors: Tensor) -> Tensor:
        """Return ``F V``."""
        return self.curvature.apply(
            lambda values: exponential_filter(values + self.decay, self.time), vectors
        )

    def shrink(self, vectors: Tensor) -> Tensor:
        """Return ``S V``."""
        return self.curvature.apply(lambda h: torch.exp(-self.time * (h + self.decay)), vectors)


def exponential_filter(values: Tensor, time: float) -> Tensor:
    """Return ``(1 - exp(-T h)) / h``; its limit ``T`` where ``h`` is 0."""
    return torch.where(values > 0, -torch.expm1(-time * values) / values, torch.full_like(values, time))


def unroll(segments: Sequence[Segment], queries: Tensor) -> Tensor:
    """Attribution scores of a run.

    Args:
        segments: in the order of training.
        queries: gradients of the measurement at the end of the run, ``(Q, P)``.

    Returns:
        Predicted changes of the measurement for leaving an example out of the run, ``(Q, N)``.
    """
    total: Tensor | float = 0.0
    for segment in reversed(segments):
        total = total + segment.response(queries) @ segment.train.T / len(segment.train)
        queries = segment.shrink(queries)
    assert isinstance(total, Tensor)
    return total


def average_factored(layout: Layout, parts: Sequence[BlockInverse]) -> BlockInverse:
    """Return the mean spectrum in the basis of the last part, where each part's diagonal is taken.

    Args:
        layout: the layers.
        parts: spectra along a segment.

    Returns:
        A spectrum; its damping is that of the last part.
    """
    last = parts[-1]
    layers = {}
    for name, layer in last.layers.items():
        values = [_in_basis(part.layers[name], layer) for part in parts]
        layers[name] = EigenInverse(layer.basis, torch.stack(values).mean(0), layer.damping)
    return BlockInverse(layout, layers)


def _in_basis(layer: EigenInverse, other: EigenInverse) -> Tensor:
    """Return the diagonal of a layer's matrix in another's eigenbasis."""
    assert layer.basis is not None
    assert other.basis is not None
    turned = [
        (new.mT @ old).square()
        for new, old in ((other.basis.q_out, layer.basis.q_out), (other.basis.q_in, layer.basis.q_in))
    ]
    diagonal: Tensor = turned[0] @ layer.eigenvalues @ turned[1].mT
    return diagonal
