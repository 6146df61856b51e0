"""Self-influence in closed form: weighted squares in the eigenbasis, with low-rank weights where they serve.

With one position per example ``g^T P^{-1} g = sum_ij W_ij d_i^2 a_j^2`` for the rotated factors ``d`` and
``a``: the weights cost ``2 D_out D_in`` operations an example, or ``2 r (D_out + D_in)`` as ``r`` outer
products. All terms are positive, so that errors of the weights average out: far fewer terms are needed than
for scores of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.factors.inverse import BlockInverse, EigenInverse
from lightning_influence.factors.low_rank import LowRank, leading_terms
from lightning_influence.factors.statistics import rotate
from lightning_influence.layers.factored import FactoredGradients
from lightning_influence.layers.gradients import LayerGradients

_RANK = 64
# The low-rank weights have to save this share of the operations on the weights.
_WORTH = 0.5


class PreconditionedSquares:
    """``g^T P^{-1} g`` of each gradient.

    Args:
        inverse: ``P``.
        tolerance: largest root-mean-square relative error that low-rank weights may make in one layer,
            measured on the first batch that is seen; 0 forbids them.
    """

    def __init__(self, inverse: BlockInverse, *, tolerance: float = 1e-3) -> None:
        self._inverse, self._tolerance = inverse, tolerance
        self._forms: dict[str, LowRank | None] = {}

    @property
    def ranks(self) -> dict[str, int]:
        """Number of terms of each layer whose weights are of low rank."""
        return {name: form.rank for name, form in self._forms.items() if form is not None}

    def __call__(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return ``(K, B)``."""
        parts = [
            self._of_layer(name, inverse, gradients[name])
            for name, inverse in self._inverse.layers.items()
            if name in gradients
        ]
        return torch.stack(parts).sum(dim=0)

    def _of_layer(self, name: str, inverse: EigenInverse, gradients: LayerGradients) -> Tensor:
        if not self._may_be_low_rank(inverse, gradients):
            return inverse.quadratic(gradients)
        rotated = gradients if inverse.basis is None else rotate(gradients, inverse.basis)
        assert isinstance(rotated, FactoredGradients)
        if name not in self._forms:
            exact = rotated.weighted_squares(inverse.weights)
            self._forms[name] = self._confirmed(inverse, rotated, exact)
            return exact
        form = self._forms[name]
        return rotated.weighted_squares(inverse.weights) if form is None else _thin_squares(rotated, form)

    def _may_be_low_rank(self, inverse: EigenInverse, gradients: LayerGradients) -> bool:
        groups, d_out, d_in = inverse.eigenvalues.shape
        return (
            self._tolerance > 0
            and groups == 1
            and isinstance(gradients, FactoredGradients)
            and gradients.inputs.shape[2] == 1
            and _RANK * (d_out + d_in) < (1 - _WORTH) * d_out * d_in
        )

    def _confirmed(self, inverse: EigenInverse, rotated: FactoredGradients, exact: Tensor) -> LowRank | None:
        """Return the form if these gradients' exact squares confirm it."""
        energy = inverse.eigenvalues[0]
        form = leading_terms(inverse.weights[0], energy.sum(1), energy.sum(0), _RANK)
        floor = torch.finfo(exact.dtype).tiny
        errors = (_thin_squares(rotated, form) - exact) / exact.clamp_min(floor)
        return form if float(errors.square().mean().sqrt()) <= self._tolerance else None


def _thin_squares(rotated: FactoredGradients, form: LowRank) -> Tensor:
    """Return ``sum_k (d^2 . u_k) (a^2 . w_k)``, ``(K, B)``."""
    rows = rotated.outputs[:, 0, :, 0].square() @ form.left.T
    columns = rotated.inputs[0, :, 0].square() @ form.right.T
    return (rows * columns).sum(dim=-1)
