"""Self-influence in closed form: weighted squares in the eigenbasis, rotated only as far as it matters.

``g^T P^{-1} g = sum_ij W_ij g'_ij^2`` with ``g' = Q_out^T g Q_in``. All terms are positive, so errors of the
weights average out: along directions of little energy an average weight serves
(:mod:`~lightning_influence.factors.aggregated`), and only the leading eigenvectors have to be multiplied by.
How many is found on a few examples of the first batch: every layer starts with few, and the layer that errs
most gets more, until the sums over the layers are right.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.factors.aggregated import Aggregated, Aggregation
from lightning_influence.factors.inverse import BlockInverse, EigenInverse
from lightning_influence.layers.factored import FactoredGradients
from lightning_influence.layers.gradients import LayerGradients

# How many examples the search looks at; with several positions each, fewer.
_CHECK_EXAMPLES, _CHECK_LONG = 64, 16
# How many times the tolerance one example may be off.
_WORST = 5.0
# Layers of fewer multiply-adds an example are not worth the search, nor are forms that save less than this.
_SMALLEST = 2**15
_WORTH = 0.2
# Leading vectors whose part is taken out before norms are measured: the norm of what is left would otherwise
# be the small difference of large numbers.
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
        return averaged_squares(gradients, form)

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
        limit = (1 - _WORTH) * exact_operations(d_out, d_in, positions)
        self._sizes = [
            size
            for size in self._aggregation.sizes(positions)
            if averaged_operations(*size, d_out, d_in, positions) < limit
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
        self.error = averaged_squares(self._gradients, self.form) - self.exact


def averaged_squares(gradients: FactoredGradients, form: Aggregated) -> Tensor:
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


def exact_operations(d_out: int, d_in: int, positions: int) -> float:
    """Return the multiply-adds of the exact weighted norm of one example."""
    if positions == 1:
        return d_in**2 + d_out**2 + d_in * d_out
    factored = positions * (d_in**2 + d_out**2) + positions * d_in * d_out
    dense = positions * d_in * d_out + d_in * d_out * (d_in + d_out)
    return min(factored, dense) + d_in * d_out


def averaged_operations(p: int, q: int, d_out: int, d_in: int, positions: int) -> float:
    """Return the multiply-adds of :func:`averaged_squares` for one example."""
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
    if inverse.basis is None or not _simple(gradients):
        return False
    d_out, d_in = inverse.eigenvalues.shape[1:]
    return exact_operations(d_out, d_in, _positions(gradients)) >= _SMALLEST
