"""Scores of answers that are held in low rank, by the cheaper of two routes a layer.

Answers of a layer are formed, which costs products with as many matrices as there are queries; or the
preconditioned queries and the directions are scored as they are held, and mixed afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.curvature.compact_two_level import CompactCorrection
from lightning_influence.curvature.low_rank_matrices import LowRankMatrices, Matrices
from lightning_influence.model.layers.gradients import FactoredGradients, LayerGradients


class CompactScorer:
    """Scores ``x_q^T g_n`` for answers ``x = t z + Q c``.

    Args:
        correction: the answers.
        room: bytes that answers may take which are formed in whole.
    """

    def __init__(self, correction: CompactCorrection, room: int) -> None:
        self._correction, self._room = correction, room
        self._formed: dict[str, Tensor] = {}
        self._looked: set[str] = set()  # layers whose route is decided

    def __call__(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return inner products ``(Q, B)``."""
        return torch.stack([self._score(name, layer) for name, layer in gradients.items()]).sum(dim=0)

    def by_layer(self, gradients: Mapping[str, LayerGradients]) -> dict[str, Tensor]:
        """Return what each layer adds to the inner products, ``(Q, B)`` by name."""
        return {name: self._score(name, layer) for name, layer in gradients.items()}

    def _score(self, name: str, layer: LayerGradients) -> Tensor:
        """Return one layer's inner products ``(Q, B)``."""
        if name not in self._looked:
            self._looked.add(name)
            self._choose(name, layer)
        if name in self._formed:
            return layer.dot(self._formed[name])[0].T
        correction = self._correction
        scores = correction.in_layer(name) @ correction.space.directions[name].dot(layer)[0].T
        if name in correction.solved:
            scores = scores + correction.steps[:, None] * correction.solved[name].dot(layer)[0].T
        return scores

    def _choose(self, name: str, layer: LayerGradients) -> None:
        """Form a layer's answers if that takes fewer operations, and there is room for them."""
        correction, count = self._correction, len(self._correction.coefficients)
        directions = correction.space.directions[name]
        parts: list[Matrices] = [directions]
        parts += [correction.solved[name]] if name in correction.solved else []
        positions = layer.inputs.shape[2] if isinstance(layer, FactoredGradients) else 1
        held = sum(_count_operations(part, positions) for part in parts)
        formed = count * directions.numel * correction.coefficients.element_size()
        if formed <= self._room and _count_dense(directions.numel, count, positions) <= held:
            self._room -= formed
            self._formed[name] = correction.form(name)


def _count_operations(matrices: Matrices, positions: int) -> float:
    """Return about how many operations an example's products with matrices take."""
    dense = _count_dense(matrices.numel, matrices.count, positions)
    if not isinstance(matrices, LowRankMatrices):
        return dense
    groups, d_out, d_in = matrices.left.shape[1], matrices.left.shape[2], matrices.right.shape[2]
    return min(dense, positions * matrices.count * matrices.rank * groups * (d_in + d_out))


def _count_dense(numel: int, count: int, positions: int) -> float:
    """Return about how many operations take products with whole matrices: gradients are formed, or not."""
    return numel * min(positions + count, positions * count)
