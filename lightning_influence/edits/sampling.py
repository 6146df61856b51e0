"""Which examples stand for the curvature of many.

In a trained classifier few examples have nearly all the curvature: where the model is sure, its output
probabilities do not move. Taking the examples whose outputs curve most is therefore a far better use of a
limited number than taking them at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.edits.passes import Losses


@dataclass(frozen=True)
class Sample:
    """Examples that stand for more.

    Attributes:
        indices: of the dataset, ascending, ``(n,)``.
        factor: what the mean curvature over them is multiplied with.
    """

    indices: Tensor
    factor: float


def most_curved(losses: Losses, limit: int | None, seed: int) -> Sample:
    """Choose the examples with the largest output curvature.

    The sum over them is scaled to the trace of the whole output curvature. Where all curve alike, as under
    squared error, the choice is random and the scale that of any random sample.

    Args:
        losses: of the examples to choose from, with the traces of their output curvature.
        limit: how many; None for all.
        seed: of the order among equals.

    Returns:
        The sample; all examples with factor 1 if there are no more than the limit.
    """
    count = len(losses.indices)
    if limit is None or count <= limit:
        return Sample(losses.indices, 1.0)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = order[losses.curvature[order].argsort(descending=True, stable=True)[:limit]].sort().values
    weight = float(losses.weights[chosen].sum() / losses.weights.sum())
    trace = float(losses.curvature[chosen].sum())
    factor = weight * float(losses.curvature.sum()) / trace if trace > 0 else 1.0
    return Sample(losses.indices[chosen], factor)
