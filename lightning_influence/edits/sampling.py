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
        coefficients: ``c``, ``(n,)``: the sum ``sum_n c_n H_n`` over them estimates a mean curvature.
    """

    indices: Tensor
    coefficients: Tensor

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Find the sample's examples in a batch.

        Args:
            indices: dataset indices of the batch, ``(B,)``.

        Returns:
            Their rows and coefficients, ``(b,)`` each.
        """
        rows = torch.isin(indices, self.indices).nonzero().flatten()
        return rows, self.coefficients[torch.searchsorted(self.indices, indices[rows])]

    def mixed(self, other: Sample, share: float) -> Sample:
        """Return the sample for ``1 - share`` times this mean curvature and ``share`` times another.

        Args:
            other: a sample of other examples.
            share: in [0, 1].
        """
        indices = torch.cat([self.indices, other.indices])
        coefficients = torch.cat([(1 - share) * self.coefficients, share * other.coefficients])
        order = indices.argsort()
        return Sample(indices[order], coefficients[order])


def most_curved(losses: Losses, limit: int | None, seed: int) -> Sample:
    """Choose the examples with the largest output curvature.

    The sum over them is scaled to the trace of the whole output curvature. Where all curve alike, as under
    squared error, the choice is random and the scale that of any random sample.

    Args:
        losses: of the examples to choose from, with the traces of their output curvature.
        limit: how many; None for all.
        seed: of the order among equals.

    Returns:
        The sample; all examples with one over their total weight if there are no more than the limit.
    """
    count, total = len(losses.indices), float(losses.weights.sum())
    scale = 1.0 / (total if total > 0 else count)
    if limit is None or count <= limit:
        return Sample(losses.indices, torch.full((count,), scale, dtype=torch.float64))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = order[losses.curvature[order].argsort(descending=True, stable=True)[:limit]].sort().values
    trace, weight = float(losses.curvature[chosen].sum()), float(losses.weights[chosen].sum())
    if trace > 0:
        scale *= float(losses.curvature.sum()) / trace
    else:
        scale = 1.0 / (weight if weight > 0 else limit)
    return Sample(losses.indices[chosen], torch.full((limit,), scale, dtype=torch.float64))
