"""Self-influence in closed form: weighted squares in the eigenbasis, rotated only as far as it matters.

``g^T P^{-1} g = sum_ij W_ij g'_ij^2`` with ``g' = Q_out^T g Q_in`` needs every rotated entry. Along the many
directions of little energy the weights differ less than the squares vary, and the sum of the squares over
all of them follows from norms, which need no rotation. So the leading ``p`` and ``q`` vectors of the two
bases keep their weights; the rest of each row, the rest of each column, and what is in neither get one weight
each: the average over the directions it stands for, weighted by their energy, which is right on average. All
terms are positive, so that the weights' errors average out.

How many vectors are kept is found on a few examples of the first batch: every layer starts with few, and the
layer that errs most gets more, until the sums over the layers are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.model.layers.gradients import FactoredGradients, LayerGradients

# Shares of a basis that may be its leading part.
SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
# Chosen by hand: a basis as small as this is not cut, as there is little to save.
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
        assert inverse.basis.q_in is not None
        assert inverse.basis.q_out is not None
        self._q_out, self._q_in = inverse.basis.q_out[0], inverse.basis.q_in[0]
        self._rows, self._columns = rows, columns
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
            self._q_out[:, self._rows[:p]],
            self._q_in[:, self._columns[:q]],
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


# Chosen by hand: how many examples the search looks at; with several positions each, fewer: each costs more.
_CHECK_EXAMPLES, _CHECK_LONG = 64, 16
# Chosen by hand: how many times the mean error that is tolerated one example may be off.
_WORST = 5.0
# Chosen by hand: layers of fewer multiply-adds an example are not worth the search, nor are forms that save
# less than this share.
_SMALLEST = 2**15
_WORTH = 0.2
# Chosen by hand: leading vectors whose part is taken out before norms are measured. The norm of what is left
# would otherwise be the small difference of large numbers.
_DEFLATED = 8


class PreconditionedSquares:
    """``g^T P^{-1} g`` of each gradient.

    Args:
        inverse: ``P``.
        tolerance: largest root-mean-square relative error that averaged weights may make, measured on
            examples of the first batch that is seen; 0 forbids them.
    """

    def __init__(self, inverse: BlockInverse, *, tolerance: float = 1e-2) -> None:
        self._inverse, self._tolerance = inverse, tolerance
        self._forms: dict[str, Aggregated] | None = None if tolerance > 0 else {}

    @property
    def kept(self) -> dict[str, tuple[int, int]]:
        """Output and input eigenvectors used, of each layer where they are not all."""
        return {name: form.sizes for name, form in (self._forms or {}).items()}

    def __call__(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return ``(K, B)``."""
        if self._forms is None:
            self._forms = self._search(gradients)
        parts = [
            self._of_layer(inverse, gradients[name], self._forms.get(name))
            for name, inverse in self._inverse.layers.items()
            if name in gradients
        ]
        return torch.stack(parts).sum(dim=0)

    @staticmethod
    def _of_layer(inverse: EigenInverse, gradients: LayerGradients, form: Aggregated | None) -> Tensor:
        if form is None or not _simple(gradients) or (all(form.cut) and _positions(gradients) > 1):
            return inverse.quadratic(gradients)
        assert isinstance(gradients, FactoredGradients)
        return sum_averaged_squares(gradients, form)

    def _search(self, gradients: Mapping[str, LayerGradients]) -> dict[str, Aggregated]:
        """Return the forms of the layers that have one; few of the gradients are compared with exact ones."""
        long = max(map(_positions, gradients.values())) > 1
        few = {
            name: layer.select(slice(0, _CHECK_LONG if long else _CHECK_EXAMPLES))
            for name, layer in gradients.items()
        }
        searches = {
            name: _Search(inverse, layer)
            for name, inverse in self._inverse.layers.items()
            if (layer := few.get(name)) is not None and _worth_a_search(inverse, layer)
        }
        if not searches:
            return {}
        exact = [
            searches[name].exact if name in searches else inverse.quadratic(few[name])
            for name, inverse in self._inverse.layers.items()
            if name in few
        ]
        total = torch.stack(exact).sum(dim=0)
        total = total.clamp_min(torch.finfo(total.dtype).tiny)
        while errors := {name: s.error / total for name, s in searches.items() if s.form is not None}:
            sums = torch.stack(list(errors.values())).sum(dim=0)
            if _within(sums, self._tolerance):
                break
            searches[max(errors, key=lambda name: float(errors[name].norm()))].refine()
        return {name: search.form for name, search in searches.items() if search.form is not None}


class _Search:
    """The forms of one layer in order of size, the present one's errors, and the exact squares at last."""

    def __init__(self, inverse: EigenInverse, gradients: LayerGradients) -> None:
        assert isinstance(gradients, FactoredGradients)
        self._gradients, self.exact = gradients, inverse.quadratic(gradients)
        self._aggregation = Aggregation(inverse)
        d_out, d_in = inverse.eigenvalues.shape[1:]
        positions = _positions(gradients)
        limit = (1 - _WORTH) * count_exact(d_out, d_in, positions)
        self._sizes = [
            size
            for size in self._aggregation.sizes(positions)
            if count_averaged(*size, d_out, d_in, positions) < limit
        ]
        self.form: Aggregated | None = None
        self.error = torch.zeros_like(self.exact)
        self.refine()

    def refine(self) -> None:
        """Go on to the next form; there is none after the last."""
        if not self._sizes:
            self.form, self.error = None, torch.zeros_like(self.exact)
            return
        self.form = self._aggregation.at(*self._sizes.pop(0))
        self.error = sum_averaged_squares(self._gradients, self.form) - self.exact


def sum_averaged_squares(gradients: FactoredGradients, form: Aggregated) -> Tensor:
    """Weighted norms of gradients of one group and one seed.

    Args:
        gradients: ``G = K = 1``; with several positions one of the bases has to be whole.
        form: the weights.

    Returns:
        ``sum_ij W_ij g'_ij^2``, ``(1, B)``.
    """
    inputs, outputs = gradients.inputs[0], gradients.outputs[0, 0]  # (B, R, D_in), (B, R, D_out)
    if inputs.shape[1] == 1:
        return _of_one_position(inputs[:, 0], outputs[:, 0], form)[None]
    if form.cut[0]:
        inputs, outputs, form = outputs, inputs, form.transposed()
    return _of_positions(inputs, outputs, form)[None]


def _of_one_position(inputs: Tensor, outputs: Tensor, form: Aggregated) -> Tensor:
    """Return ``(B,)`` from inputs ``(B, D_in)`` and output gradients ``(B, D_out)``."""
    columns, column_rest = _squares(inputs, form.q_in)
    rows, row_rest = _squares(outputs, form.q_out)
    total = ((rows @ form.kept) * columns).sum(1)
    return (
        total
        + column_rest * (rows @ form.row_rest + row_rest * form.rest)
        + row_rest * (columns @ form.column_rest)
    )


def _squares(factors: Tensor, leading: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared coordinates ``(B, k)`` along leading vectors, and the square of the rest ``(B,)``."""
    coordinates = factors @ leading
    squares = coordinates.square()
    if leading.shape[0] == leading.shape[1]:
        return squares, squares.new_zeros(len(squares))
    left = torch.addmm(factors, coordinates[:, :_DEFLATED], leading[:, :_DEFLATED].T, alpha=-1)
    rest = left.square().sum(1) - squares[:, _DEFLATED:].sum(1)
    return squares, rest.clamp_min(0)


def _of_positions(inputs: Tensor, outputs: Tensor, form: Aggregated) -> Tensor:
    """Return ``(B,)`` from inputs ``(B, R, D_in)`` and output gradients ``(B, R, D_out)``, inputs cut."""
    rotated = outputs @ form.q_out
    coordinates = inputs @ form.q_in
    squares = torch.bmm(rotated.transpose(1, 2), coordinates).square_()  # (B, D_out, q)
    deflated = coordinates[..., :_DEFLATED].flatten(0, 1)
    left = torch.addmm(inputs.flatten(0, 1), deflated, form.q_in[:, :_DEFLATED].T, alpha=-1).view_as(inputs)
    rest = _row_norms(rotated, left) - squares[..., _DEFLATED:].sum(2)
    kept = squares.flatten(1) @ form.kept.flatten()
    return kept + rest.clamp_min_(0) @ form.row_rest


def _row_norms(rows: Tensor, inputs: Tensor) -> Tensor:
    """Return ``|sum_r rows_br,i inputs_br|^2``, ``(B, D_out)``; products of positions or the matrices."""
    positions, d_out, d_in = rows.shape[1], rows.shape[2], inputs.shape[2]
    if positions * (d_in + d_out) < d_in * d_out:
        return (torch.bmm(torch.bmm(inputs, inputs.transpose(1, 2)), rows) * rows).sum(1)
    return torch.bmm(rows.transpose(1, 2), inputs).square_().sum(2)


def count_exact(d_out: int, d_in: int, positions: int) -> float:
    """Return the multiply-adds of the exact weighted norm of one example."""
    if positions == 1:
        return d_in**2 + d_out**2 + d_in * d_out
    factored = positions * (d_in**2 + d_out**2) + positions * d_in * d_out
    dense = positions * d_in * d_out + d_in * d_out * (d_in + d_out)
    return min(factored, dense) + d_in * d_out


def count_averaged(p: int, q: int, d_out: int, d_in: int, positions: int) -> float:
    """Return the multiply-adds of :func:`sum_averaged_squares` for one example."""
    if positions == 1:
        return (p + _DEFLATED) * d_out + (q + _DEFLATED) * d_in + p * q
    norms = min(positions**2 * (d_in + d_out), positions * d_in * d_out)
    cut = d_in if q < d_in else d_out
    return positions * (p * d_out + q * d_in + p * q + _DEFLATED * cut) + norms


def _within(errors: Tensor, tolerance: float) -> bool:
    """Return whether relative errors are small on average, and none is large."""
    mean_square, worst = errors.square().mean(), errors.abs().max()
    return float(mean_square.sqrt()) <= tolerance and float(worst) <= _WORST * tolerance


def _positions(gradients: LayerGradients) -> int:
    """Return ``R``; 1 for matrices."""
    return gradients.inputs.shape[2] if isinstance(gradients, FactoredGradients) else 1


def _simple(gradients: LayerGradients) -> bool:
    """Return whether the gradients are factored, with one group and one seed."""
    return isinstance(gradients, FactoredGradients) and (
        gradients.inputs.shape[0] == gradients.outputs.shape[0] == 1
    )


def _worth_a_search(inverse: EigenInverse, gradients: LayerGradients) -> bool:
    """Return whether averaged weights may serve a layer."""
    if inverse.basis is None or not inverse.basis.is_whole or not _simple(gradients):
        return False
    d_out, d_in = inverse.eigenvalues.shape[1:]
    return count_exact(d_out, d_in, _positions(gradients)) >= _SMALLEST
