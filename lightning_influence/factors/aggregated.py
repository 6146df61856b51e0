"""Weights of squares that are exact along leading eigenvectors, and averages over the rest of the basis.

A weighted norm ``sum_ij W_ij g_ij^2`` in an eigenbasis needs every rotated entry. Along the many directions
of little energy the weights differ less than the squares vary, and the sum of the squares over all of them
follows from norms, which need no rotation. So the leading ``p`` and ``q`` vectors of the two bases keep their
weights; the rest of each row, the rest of each column, and what is in neither get one weight each, the
average over the directions it stands for, weighted by their energy: right on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.factors.inverse import EigenInverse

# Shares of a basis that may be its leading part.
SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
# A basis as small as this is not cut: there is little to save.
_SMALL = 64


@dataclass(frozen=True)
class Aggregated:
    """Weights ``W`` of one layer, averaged outside the leading vectors.

    Attributes:
        q_out: leading output vectors, ``(D_out, p)``, by decreasing energy.
        q_in: leading input vectors, ``(D_in, q)``, by decreasing energy.
        kept: weights along both, ``(p, q)``.
        row_rest: weight of the rest of each leading output vector's row, ``(p,)``.
        column_rest: weight of the rest of each leading input vector's column, ``(q,)``.
        rest: weight of what is in neither.
    """

    q_out: Tensor
    q_in: Tensor
    kept: Tensor
    row_rest: Tensor
    column_rest: Tensor
    rest: Tensor

    @property
    def sizes(self) -> tuple[int, int]:
        """``(p, q)``."""
        return self.q_out.shape[1], self.q_in.shape[1]

    @property
    def cut(self) -> tuple[bool, bool]:
        """Whether output vectors, and whether input vectors are left out."""
        return self.q_out.shape[1] < self.q_out.shape[0], self.q_in.shape[1] < self.q_in.shape[0]

    def transposed(self) -> Aggregated:
        """Return the same with inputs and outputs in each other's place."""
        return Aggregated(self.q_in, self.q_out, self.kept.T, self.column_rest, self.row_rest, self.rest)


class Aggregation:
    """All ways to average one layer's weights.

    Args:
        inverse: whose weights they are, with one group and a basis.
    """

    def __init__(self, inverse: EigenInverse) -> None:
        assert inverse.basis is not None
        energy, weights = inverse.eigenvalues[0], inverse.weights[0]
        rows = energy.sum(1).argsort(descending=True, stable=True)
        columns = energy.sum(0).argsort(descending=True, stable=True)
        self._basis, self._rows, self._columns = inverse.basis, rows, columns
        self._energy, self._weights = energy[rows][:, columns], weights[rows][:, columns]

    def at(self, p: int, q: int) -> Aggregated:
        """Keep the leading ``p`` output and ``q`` input vectors.

        Args:
            p: from 1 to ``D_out``.
            q: from 1 to ``D_in``.

        Returns:
            The averaged weights.
        """
        weights, energy = self._weights, self._energy
        return Aggregated(
            self._basis.q_out[0][:, self._rows[:p]],
            self._basis.q_in[0][:, self._columns[:q]],
            weights[:p, :q].contiguous(),
            _average(weights[:p, q:], energy[:p, q:], 1),
            _average(weights[p:, :q], energy[p:, :q], 0),
            _average(weights[p:, q:].flatten(), energy[p:, q:].flatten(), 0),
        )

    def sizes(self, positions: int) -> list[tuple[int, int]]:
        """Sizes worth trying, from the smallest: with several positions only the larger basis is cut.

        Args:
            positions: of each example.

        Returns:
            Pairs ``(p, q)``.
        """
        d_out, d_in = self._weights.shape
        pairs = []
        for share in SHARES:
            p, q = _leading(share, d_out), _leading(share, d_in)
            if positions > 1:
                p, q = (d_out, q) if d_in >= d_out else (p, d_in)
            pairs.append((p, q))
        return pairs


def _leading(share: float, width: int) -> int:
    return width if width <= _SMALL else round(share * width)


def _average(weights: Tensor, energy: Tensor, dim: int) -> Tensor:
    """Return the mean of the weights by energy, of the plain weights where there is none; 0 of nothing."""
    if not weights.shape[dim]:
        return weights.sum(dim)
    total = energy.sum(dim)
    mean = (weights * energy).sum(dim) / total.clamp_min(torch.finfo(energy.dtype).tiny)
    return torch.where(total > 0, mean, weights.mean(dim))
