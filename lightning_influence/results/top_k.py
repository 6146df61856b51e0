"""The highest and lowest scores of every query, deterministically, at once or batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from lightning_influence.support.errors import NonFiniteError
from lightning_influence.support.waiting import expect

# Scores that are ranked together: a ranking needs several times their memory, which for all scores of all
# queries would be the peak of the whole call. Of 2,000 x 12,000 scores, 2**16 at once took .27 s and 4 MiB,
# 2**18 took .25 s and 14 MiB, 2**20 took .40 s and 30 MiB (one thread, measured by hand).
_SCORES_AT_ONCE = 2**16


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
    rows = max(1, _SCORES_AT_ONCE // max(1, scores.shape[1]))
    if len(scores) <= rows:
        return _select(scores, indices, k, largest)
    count = min(k, scores.shape[1])
    best = Ranked(
        scores.new_empty(len(scores), count), indices.new_empty(len(scores), count, device=scores.device)
    )
    for start in range(0, len(scores), rows):
        part = _select(scores[start : start + rows], indices, k, largest)
        best.scores[start : start + rows], best.indices[start : start + rows] = part
    return best


def _select(scores: Tensor, indices: Tensor, k: int, largest: bool) -> Ranked:
    signed = scores if largest else -scores
    indices, order = indices.to(signed.device, non_blocking=True).sort()
    signed = signed[:, order]
    if signed.shape[1] > k:
        chosen = _at_least_kth(signed, k)
        columns = _find_columns(chosen, k)
    else:
        columns = torch.arange(signed.shape[1], device=signed.device).expand(signed.shape)
    # The columns ascend by index, which a stable sort keeps among equal scores.
    values, ranks = signed.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return Ranked(values if largest else -values, indices[columns.gather(1, ranks)])


def _find_columns(chosen: Tensor, k: int) -> Tensor:
    """Return the columns ``(Q, k)`` that a mask ``(Q, B)`` chooses, ascending, ``k`` of each row."""
    if chosen.is_cpu:
        return chosen.nonzero()[:, 1].view(len(chosen), k)
    # How many there are is known here, and an accelerator need not be asked.
    places = torch.arange(chosen.shape[1], device=chosen.device).where(chosen, chosen.shape[1])
    return places.topk(k, dim=1, largest=False, sorted=True).values


def _at_least_kth(scores: Tensor, k: int) -> Tensor:
    """Return the mask ``(Q, B)`` of the ``k`` highest of each row; among equals, of the first columns."""
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
    if scores.numel() == 0:
        return

    def refuse() -> NoReturn:
        bad = ~scores.isfinite()
        first = int(indices[bad.reshape(-1, len(indices)).any(0).cpu().nonzero()[0, 0]])
        raise NonFiniteError(
            f"{int(bad.sum())} of {scores.numel()} scores are NaN or infinite, the first for training "
            f"example {first}; look at the losses and at the damping"
        )

    # Extremes tell without a copy or a mask of the scores: NaN is the extreme of whatever holds it.
    expect(torch.stack(torch.aminmax(scores.detach())).isfinite().all(), refuse)


class Extremes(NamedTuple):
    """Both ends of every query's ranking, and the dataset indices ``(N,)`` that were ranked, ascending."""

    top: Ranked
    bottom: Ranked
    train_indices: Tensor

    def scale(self, factor: float) -> Extremes:
        """Scores times a positive number.

        Returns:
            The same rankings in another unit.
        """
        return Extremes(
            Ranked(self.top.scores * factor, self.top.indices),
            Ranked(self.bottom.scores * factor, self.bottom.indices),
            self.train_indices,
        )

    def gather(self, all_gather_cat: Callable[[Tensor], Tensor], k: int) -> Extremes:
        """The ends of the rankings of all processes, each of which ranked its share.

        Args:
            all_gather_cat: joins all processes' tensors along the first dimension.
            k: how many to keep at either end.

        Returns:
            The joint rankings, the same on every process.
        """
        ends = []
        for end, largest in ((self.top, True), (self.bottom, False)):
            scores = all_gather_cat(end.scores.T.contiguous()).T
            indices = all_gather_cat(end.indices.T.contiguous()).T
            order = indices.argsort(dim=1)  # ties go to the lower index, as on one process
            scores, indices = scores.gather(1, order), indices.gather(1, order)
            best = scores.argsort(dim=1, descending=largest, stable=True)[:, :k]
            ends.append(Ranked(scores.gather(1, best), indices.gather(1, best)))
        return Extremes(ends[0], ends[1], all_gather_cat(self.train_indices).sort().values)


class _SeenIndices:
    """Which dataset indices have come by: one byte for each up to the highest."""

    def __init__(self) -> None:
        self._mask = torch.zeros(0, dtype=torch.bool)

    def add(self, indices: Tensor) -> None:
        indices = indices.cpu()
        if indices.numel() == 0:
            return
        if int(indices.min()) < 0:
            raise ValueError(f"dataset indices are 0 or higher, got {int(indices.min())}")
        missing = int(indices.max()) + 1 - len(self._mask)
        if missing > 0:
            room = max(missing, len(self._mask))
            self._mask = torch.cat([self._mask, torch.zeros(room, dtype=torch.bool)])
        ordered = indices.sort().values
        repeated = torch.cat([indices[self._mask[indices]], ordered[1:][ordered.diff() == 0]])
        if len(repeated):
            raise ValueError(
                f"{len(repeated)} indices came twice, the first of them {repeated[:5].tolist()}; every "
                "training example is ranked once: use a sampler without replacement"
            )
        self._mask[indices] = True

    def indices(self) -> Tensor:
        return self._mask.nonzero()[:, 0]


class StreamingTopK:
    """Keeps the ``k`` best scores of each query while batches of training examples pass by.

    Memory is ``Q * k`` scores and indices, and one byte per dataset index to notice examples that come twice.
    With fewer than ``k`` examples the result holds what there is.

    Args:
        num_queries: ``Q``.
        k: how many to keep.
        largest: whether the highest scores are the best, or the lowest.

    Raises:
        ValueError: if ``num_queries`` or ``k`` is below 1.

    Example:
        >>> best = StreamingTopK(num_queries=1, k=2)
        >>> best.update(torch.tensor([[0.5, -1.0]]), torch.tensor([10, 11]))
        >>> best.update(torch.tensor([[2.0]]), torch.tensor([12]))
        >>> best.result()
        Ranked(scores=tensor([[2.0000, 0.5000]]), indices=tensor([[12, 10]]))
    """

    def __init__(self, num_queries: int, k: int, *, largest: bool = True) -> None:
        if num_queries < 1 or k < 1:
            raise ValueError(f"num_queries and k are at least 1, got {num_queries} and {k}")
        self.num_queries = num_queries
        self.k = k
        self.largest = largest
        self._seen = _SeenIndices()
        self._best: Ranked | None = None

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Take in a batch of training examples.

        Args:
            scores: ``(Q, B)`` floating-point scores, of one dtype and device throughout.
            indices: ``(B,)`` dataset indices, each seen once over all batches.

        Raises:
            ValueError: if shapes, dtypes or devices do not fit, or an index came before.
            NonFiniteError: if a score is NaN or infinite.
        """
        check_batch(scores, indices, self.num_queries)
        self._seen.add(indices)
        self._absorb(scores, indices)

    def result(self) -> Ranked:
        """What was kept so far.

        Returns:
            The ``min(k, N)`` best scores and indices of each query, best first; ``(Q, 0)`` before any update.
        """
        if self._best is None:
            none = torch.empty(self.num_queries, 0)
            return Ranked(none, none.long())
        return self._best

    def _absorb(self, scores: Tensor, indices: Tensor) -> None:
        batch = select_topk(scores.detach(), indices, self.k, largest=self.largest)
        if self._best is None:
            self._best = batch
            return
        kept = self._best.scores
        if (kept.dtype, kept.device) != (scores.dtype, scores.device):
            raise ValueError(
                f"scores were {kept.dtype} on {kept.device}, now {scores.dtype} on {scores.device}: "
                "keep to one"
            )
        self._best = merge(self._best, batch, self.k, largest=self.largest)


class StreamingExtremes:
    """The ``k`` highest and the ``k`` lowest scores of each query in one go; see :class:`StreamingTopK`.

    Args:
        num_queries: ``Q``.
        k: how many to keep at either end.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self._top = StreamingTopK(num_queries, k, largest=True)
        self._bottom = StreamingTopK(num_queries, k, largest=False)
        self._seen = _SeenIndices()

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Take in scores ``(Q, B)`` of training examples with dataset indices ``(B,)``."""
        check_batch(scores, indices, self._top.num_queries)
        self._seen.add(indices)
        self._top._absorb(scores, indices)
        self._bottom._absorb(scores, indices)

    def result(self) -> Extremes:
        """What was kept so far.

        Returns:
            Both ends of every ranking, the top from the highest score, the bottom from the lowest.
        """
        return Extremes(self._top.result(), self._bottom.result(), self._seen.indices())
