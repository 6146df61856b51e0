"""Which examples stand for many.

In a trained classifier few examples have nearly all the curvature: where the model is sure, its output
probabilities do not move. Taking the examples whose outputs curve most is therefore a far better use of a
limited number than taking them at random. For an objective that is minimised far away from the weights as
they are, that would leave out the examples that an edit spoils; there the curved ones are only likelier.
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
        coefficients: ``c``, ``(n,)``: the sum ``sum_n c_n H_n`` over them estimates a mean curvature, and
            ``sum_n c_n l_n`` a mean loss.
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

    def times(self, factor: float) -> Sample:
        """Return the sample for a multiple of what this one stands for."""
        return Sample(self.indices, factor * self.coefficients)

    def mixed(self, other: Sample, share: float) -> Sample:
        """Return the sample for ``1 - share`` times this mean curvature and ``share`` times another.

        Args:
            other: a sample of other examples.
            share: in [0, 1].
        """
        indices = torch.cat([self.indices, other.indices])
        coefficients = torch.cat([self.times(1 - share).coefficients, other.times(share).coefficients])
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


def drawn(losses: Losses, limit: int | None, seed: int) -> Sample:
    """Draw examples whose sum is an unbiased estimate of the mean, whatever is summed.

    Three in four are drawn by their share of the output curvature and one by its weight, and an example
    counts as much more as it was unlikely (Horvitz & Thompson 1952). The fourth bounds how much that is: an
    example that does not curve now may do so further on (Hesterberg 1995).

    Args:
        losses: of the examples to choose from, with the traces of their output curvature.
        limit: how many; None for all.
        seed: of the draw.

    Returns:
        The sample; all examples with one over their total weight if there are no more than the limit.
    """
    count, total = len(losses.indices), float(losses.weights.sum())
    if limit is None or count <= limit or total <= 0:
        return most_curved(losses, limit, seed)
    trace = losses.curvature.sum().clamp_min(torch.finfo(torch.float64).tiny)
    chances = _inclusion(3 * losses.curvature / trace + losses.weights / total, limit)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    # Systematic: marks one apart on the line of all chances, in random order, hit as many as their sum says.
    marks = chances[order].cumsum(0) - torch.rand(1, generator=generator, dtype=torch.float64)
    hits = marks.ceil().diff(prepend=torch.zeros(1, dtype=torch.float64)) > 0
    chosen = order[hits].sort().values
    return Sample(losses.indices[chosen], 1.0 / (total * chances[chosen]))


def _inclusion(sizes: Tensor, limit: int) -> Tensor:
    """Return chances in [0, 1], in proportion to sizes up to where they are 1, that add up to a number."""
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    while True:
        rest = torch.where(certain, 0.0, sizes)
        scaled = rest * ((limit - int(certain.sum())) / float(rest.sum()))
        more = scaled >= 1
        if not bool(more.any()):
            return torch.where(certain, 1.0, scaled)
        certain |= more
        if not bool((sizes[~certain] > 0).any()):
            return certain.to(sizes)
