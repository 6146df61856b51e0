"""Positions of a sequence: a layer's gradient is a sum of what it has at each, taken apart here."""

from __future__ import annotations

from torch import Tensor

from lightning_influence.model.layers.gradients import FactoredGradients, LayerGradients
from lightning_influence.model.layers.table_gradients import TableGradients


def count_positions(gradients: LayerGradients) -> int:
    """Return how many positions each example's gradient is a sum of; 0 where it is held as a whole."""
    if isinstance(gradients, FactoredGradients):
        return gradients.inputs.shape[2]
    if isinstance(gradients, TableGradients):
        counts = {gradients.rows.shape[1], gradients.products.inputs.shape[2]} - {0}
        return counts.pop() if len(counts) == 1 else 0
    return 0


def split_positions(gradients: LayerGradients) -> LayerGradients:
    """Return the ``R`` positions of each of ``B`` examples as ``B R`` examples, those of one in a run.

    Args:
        gradients: of which :func:`count_positions` is not 0.

    Raises:
        TypeError: if they are held as a whole.
    """
    count = count_positions(gradients)
    if isinstance(gradients, FactoredGradients):
        return FactoredGradients(_split(gradients.inputs, 1, count), _split(gradients.outputs, 2, count))
    if isinstance(gradients, TableGradients) and count:
        products = gradients.products
        return TableGradients(
            _split(gradients.rows, 0, count),
            _split(gradients.values, 1, count),
            FactoredGradients(_split(products.inputs, 1, count), _split(products.outputs, 2, count)),
        )
    raise TypeError(f"{type(gradients).__name__} of no positions cannot be split by them")


def _split(x: Tensor, dim: int, count: int) -> Tensor:
    """Return ``(..., B, R, ...)`` as ``(..., B R, 1, ...)``; without positions there are none of any."""
    before, (examples, positions), after = x.shape[:dim], x.shape[dim : dim + 2], x.shape[dim + 2 :]
    if positions == 0:
        return x.new_zeros(*before, examples * count, 0, *after)
    return x.reshape(*before, examples * count, 1, *after)
