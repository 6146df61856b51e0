"""Leave-one-out retraining and removal curves: what does training without the chosen examples change?

Both take the retraining as a function of masks, ``retrain(masks (M, N)) -> (M, Q)`` or ``(M, S, Q)``, the
mean over seeds being what is measured: :func:`~lightning_influence.evaluation.retrain_subsets` with its other
arguments bound, a training loop of one's own, or a closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_influence.support.arguments import check_choice, read_examples, to_integers

Retrain = Callable[[Tensor], Tensor]
Order = Literal["proponents", "opponents", "random"]


def leave_one_out(
    retrain: Retrain, num_examples: int, examples: Sequence[int] | Tensor | None = None
) -> Tensor:
    """Change of every query's measurement on training without one example.

    This is what an attribution score predicts, in its unit and with its sign. It is small beside the noise of
    training unless the runs of one seed share their random numbers, as those of ``retrain_subsets`` do.

    Args:
        retrain: trains on subsets ``(M, N)`` and measures the queries, ``(M, Q)`` or ``(M, S, Q)``.
        num_examples: ``N``.
        examples: which to leave out, one at a time: indices, or a boolean mask ``(N,)``; all of them if None.

    Returns:
        ``m(q)`` without an example minus ``m(q)`` with all, ``(Q, M)``.

    Raises:
        ValueError: if an index is out of range, or the retraining returns something else.

    Example:
        >>> leave_one_out(lambda masks: masks.float() @ torch.tensor([[1.0], [2.0]]), 2)
        tensor([[-1., -2.]])
    """
    if num_examples < 2:
        raise ValueError(f"Leaving one example out needs 2 or more of them, got num_examples={num_examples}.")
    chosen = read_examples(range(num_examples) if examples is None else examples, num_examples)
    masks = torch.ones(1 + len(chosen), num_examples, dtype=torch.bool)
    masks[torch.arange(1, len(masks)), torch.tensor(chosen)] = False
    values = _measure(retrain, masks)
    return (values[1:] - values[0]).T


@dataclass(frozen=True)
class RemovalCurve:
    """Change of each query's measurement on training without its first ``k`` examples in some order.

    Attributes:
        counts: ``k``, ``(K,)``.
        changes: measured, ``(K, Q)``.
        predicted: the sum of the removed examples' scores, ``(K, Q)``.
    """

    counts: Tensor
    changes: Tensor
    predicted: Tensor


def removal_curve(
    scores: Tensor,
    retrain: Retrain,
    counts: Sequence[int] | Tensor,
    *,
    order: Order = "proponents",
    seed: int = 0,
) -> RemovalCurve:
    """Remove each query's ``k`` strongest examples, retrain, and measure that query.

    With scores of the loss, removing proponents should raise it and removing opponents lower it; the further,
    the better the scores. ``"random"`` is the curve to compare with. Every query has examples of its own, so
    the models number ``K Q + 1``, less where queries agree.

    Args:
        scores: ``tau``, ``(Q, N)``.
        retrain: trains on subsets ``(M, N)`` and measures all queries, ``(M, Q)`` or ``(M, S, Q)``.
        counts: numbers of examples to remove, from 1 to ``N - 1``.
        order: ``"proponents"`` removes the largest scores first, ``"opponents"`` the smallest.
        seed: of the random order.

    Returns:
        The curve.

    Raises:
        ValueError: if an argument is out of range, or the retraining returns something else.
    """
    masks = removal_masks(scores, counts, order=order, seed=seed)
    queries = len(scores)
    steps = masks.shape[0]
    removed = masks.flatten(0, 1)
    # Queries that agree share a model.
    wanted = torch.cat([torch.ones_like(removed[:1]), removed])
    distinct, places = torch.unique(wanted, dim=0, return_inverse=True)
    values = _measure(retrain, distinct)[places]
    if values.shape[1] != queries:
        raise ValueError(f"scores have {queries} queries, the retraining measured {values.shape[1]}.")
    own = torch.arange(queries).repeat(steps)
    changes = (values[1:] - values[0]).gather(1, own[:, None].to(values.device)).view(steps, queries)
    predicted = torch.einsum("qn,kqn->kq", scores, (~masks).to(scores))
    return RemovalCurve(torch.tensor(to_integers(counts)), changes, predicted)


def removal_masks(
    scores: Tensor, counts: Sequence[int] | Tensor, *, order: Order = "proponents", seed: int = 0
) -> Tensor:
    """Examples that each query keeps.

    Args:
        scores: ``(Q, N)``.
        counts: numbers of examples to remove.
        order: which are removed first; equal scores in the order of the examples.
        seed: of the random order, one for every query.

    Returns:
        Kept examples, boolean, ``(K, Q, N)``.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> removal_masks(torch.tensor([[0.1, 0.5, -0.2]]), [1])
        tensor([[[ True, False,  True]]])
    """
    if scores.ndim != 2 or not bool(scores.isfinite().all()):
        raise ValueError(f"scores must be finite, of shape (Q, N), got shape {tuple(scores.shape)}.")
    check_choice("order", order, get_args(Order))
    size = scores.shape[1]
    numbers = to_integers(counts)
    if not numbers or not all(1 <= count < size for count in numbers):
        got = counts if numbers is None else numbers
        raise ValueError(
            f"counts must be from 1 to N - 1 = {size - 1}, got {got!r}: accepted are integers, one or more."
        )
    keys = scores.cpu()
    if order == "random":
        keys = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
    ranked = keys.argsort(dim=1, descending=order != "opponents", stable=True)
    kept = torch.ones(len(numbers), *scores.shape, dtype=torch.bool)
    for row, count in zip(kept, numbers, strict=True):
        row.scatter_(1, ranked[:, :count], value=False)
    return kept


def _measure(retrain: Retrain, masks: Tensor) -> Tensor:
    """Return the values of subsets, averaged over seeds, ``(M, Q)``.

    Raises:
        ValueError: if they have another shape or are not finite.
    """
    values = retrain(masks)
    averaged = values.mean(1) if values.ndim == 3 else values
    if averaged.ndim != 2 or len(averaged) != len(masks) or not bool(averaged.isfinite().all()):
        raise ValueError(
            f"The retraining of {len(masks)} subsets returned values of shape {tuple(values.shape)}; "
            "accepted are finite ones of shape (M, Q) or (M, S, Q)."
        )
    return averaged
