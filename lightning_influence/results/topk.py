"""The highest or lowest scores per query, deterministically.

Equal scores are ranked by their index, lower first, so that the answer depends on the scores and indices
alone: not on the order or the size of the batches they came in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_influence.errors import NonFiniteError


class Ranked(NamedTuple):
    """Scores ``(Q, k)``, best first, and the dataset indices ``(Q, k)`` they belong to."""

    scores: Tensor
    indices: Tensor


def select_topk(scores: Tensor, indices: Tensor, k: int, *, largest: bool = True) -> Ranked:
    """The ``k`` best of each row, best first; equal scores by lower index.

    Args:
        scores: ``(Q, B)`` finite scores.
        indices: ``(B,)`` distinct indices of the columns.
        k: how many; all of them when there are fewer.
        largest: whether the highest scores are the best, or the lowest.

    Returns:
        ``min(k, B)`` scores and indices for each of the ``Q`` rows.

    Example:
        >>> select_topk(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([7, 9, 8]), 2).indices
        tensor([[8, 9]])
    """
    signed = scores if largest else -scores
    indices, order = indices.to(signed.device).sort()
    signed = signed[:, order]
    if signed.shape[1] > k:
        chosen = _at_least_kth(signed, k)
        columns = chosen.nonzero()[:, 1].view(signed.shape[0], k)
    else:
        columns = torch.arange(signed.shape[1], device=signed.device).expand(signed.shape)
    # The columns ascend by index, which a stable sort keeps among equal scores.
    values, ranks = signed.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return Ranked(values if largest else -values, indices[columns.gather(1, ranks)])


def _at_least_kth(scores: Tensor, k: int) -> Tensor:
    """Returns the mask ``(Q, B)`` of the ``k`` highest of each row; among equals, of the first columns."""
    kth = scores.topk(k, dim=1).values[:, -1:]
    above = scores > kth
    equal = scores == kth
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def merge(first: Ranked, second: Ranked, k: int, *, largest: bool) -> Ranked:
    """Return the ``k`` best of two rankings of different examples, in the order of :func:`select_topk`."""
    scores = torch.cat([first.scores, second.scores], 1)
    indices = torch.cat([first.indices, second.indices], 1)
    indices, by_index = indices.sort(dim=1)
    values, ranks = scores.gather(1, by_index).sort(dim=1, descending=largest, stable=True)
    return Ranked(values[:, :k], indices.gather(1, ranks)[:, :k])


def check_batch(scores: Tensor, indices: Tensor, num_queries: int) -> None:
    """Refuse scores and indices that do not fit each other.

    Args:
        scores: ``(Q, B)``.
        indices: ``(B,)``.
        num_queries: ``Q``.

    Raises:
        ValueError: if a shape or a dtype is wrong.
        NonFiniteError: if a score is NaN or infinite.
    """
    if scores.dim() != 2 or indices.dim() != 1 or scores.shape != (num_queries, len(indices)):
        raise ValueError(
            f"expected scores ({num_queries}, B) and indices (B,), "
            f"got {tuple(scores.shape)} and {tuple(indices.shape)}"
        )
    if not scores.is_floating_point() or indices.dtype != torch.long:
        raise ValueError(
            f"expected floating-point scores and int64 indices, got {scores.dtype} and {indices.dtype}"
        )
    check_finite(scores, indices)


def check_finite(scores: Tensor, indices: Tensor) -> None:
    """Refuse NaN and infinite scores.

    Args:
        scores: ``(..., N)``.
        indices: ``(N,)``, named in the message.

    Raises:
        NonFiniteError: if a score is NaN or infinite.
    """
    bad = ~scores.isfinite()
    if bool(bad.any()):
        first = int(indices[bad.reshape(-1, len(indices)).any(0).nonzero()[0, 0]])
        raise NonFiniteError(
            f"{int(bad.sum())} of {scores.numel()} scores are NaN or infinite, the first for training "
            f"example {first}; look at the losses and at the damping"
        )
