"""Linear datamodeling score: do the scores predict what retraining on subsets measures?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def random_subsets(num_examples: int, count: int, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """Random subsets of equal size, drawn without replacement.

    Args:
        num_examples: ``N``, the size of the training set.
        count: ``M``, the number of subsets.
        fraction: share of the examples that a subset keeps; at least one is kept and at least one left out.
        seed: of the draw.

    Returns:
        Kept examples, boolean, shape ``(M, N)``.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> random_subsets(5, 2, fraction=0.4).sum(1)
        tensor([2, 2])
    """
    if num_examples < 2 or count < 1 or not 0 < fraction < 1:
        raise ValueError(
            "random_subsets needs at least 2 examples, at least 1 subset and 0 < fraction < 1, got "
            f"{num_examples}, {count} and {fraction}."
        )
    kept = min(max(int(fraction * num_examples), 1), num_examples - 1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(num_examples, generator=generator) for _ in range(count)])
    masks = torch.zeros(count, num_examples, dtype=torch.bool)
    return masks.scatter_(1, order[:, :kept], value=True)


def predict_subsets(scores: Tensor, masks: Tensor) -> Tensor:
    """Change of each query's measurement that scores predict for training on each subset.

    A score ``tau(q, n)`` is the change of ``m(q)`` on removing example ``n``, so a subset's prediction is the
    sum of the scores of the examples left *out*. (Minus the sum over the kept ones differs by a constant per
    query, which a rank correlation does not see.)

    Args:
        scores: ``tau``, shape ``(Q, N)``.
        masks: kept examples, boolean, shape ``(M, N)``.

    Returns:
        Predicted changes, shape ``(M, Q)``, in the measurement's unit.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> predict_subsets(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, False, False]]))
        tensor([[6.]])
    """
    if scores.ndim != 2 or masks.ndim != 2 or masks.dtype != torch.bool or scores.shape[1] != masks.shape[1]:
        raise ValueError(
            f"Expected scores (Q, N) and boolean masks (M, N) with the same N, got {tuple(scores.shape)} and "
            f"{masks.dtype} {tuple(masks.shape)}. scores has one row per query."
        )
    return (~masks).to(scores.dtype) @ scores.T


def _rank(values: Tensor) -> Tensor:
    """Return the ranks, from 1, of ``values (M, Q)`` over the subsets; equal values share their mean rank."""
    columns = values.T.contiguous()
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns)
    through = torch.searchsorted(ordered, columns, right=True)
    return ((below + through + 1).to(torch.float64) / 2).T


def _average_correlations(predicted: Tensor, observed: Tensor) -> Tensor:
    """Average Spearman's rank correlation over queries; one that never varies on either side counts 0.

    The ranks are ours because those of torchmetrics are in float32, and its correlation is divided by a
    variance that is too large by 1e-6: with few subsets that shows.

    Args:
        predicted: ``(M, Q)``.
        observed: ``(M, Q)``.

    Returns:
        The mean, float64.
    """
    left, right = _rank(predicted), _rank(observed)
    left, right = left - left.mean(0), right - right.mean(0)
    correlations = (left * right).sum(0) / (left.square().sum(0) * right.square().sum(0)).sqrt()
    return correlations.nan_to_num(nan=0.0).mean()


def _average_seeds(observed: Tensor) -> Tensor:
    return observed.mean(1) if observed.ndim == 3 else observed


def _check(predicted: Tensor, observed: Tensor) -> None:
    if predicted.ndim != 2 or predicted.shape != observed.shape:
        raise ValueError(
            "Expected predicted (M, Q) and observed (M, Q) or (M, S, Q) with the same subsets and queries, "
            f"got {tuple(predicted.shape)} and, after averaging any seeds, {tuple(observed.shape)}."
        )
    if not (predicted.isfinite().all() and observed.isfinite().all()):
        raise ValueError("Predicted and observed values must be finite; a rank of NaN means nothing.")


def linear_datamodeling_score(
    predicted: Tensor, observed: Tensor, *, bootstrap: int = 0, confidence: float = 0.95, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Linear datamodeling score and, if asked for, its bootstrap interval over subsets.

    A resample repeats subsets, whose ties pull a rank correlation towards 0; the draws are therefore centred
    on the score before their quantiles are taken.

    Args:
        predicted: predicted change of each query's measurement on each subset, ``(M, Q)``.
        observed: measured values of the retrained models, ``(M, Q)`` or ``(M, S, Q)``.
        bootstrap: number of resamples of the subsets; 0 gives no interval.
        confidence: coverage of the interval, between 0 and 1.
        seed: of the resampling.

    Returns:
        The score, in ``[-1, 1]``, and the interval ``(2,)`` or None.

    Raises:
        ValueError: if shapes do not fit, there are fewer than 2 subsets, or a value is not finite.

    Example:
        >>> predicted = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 6.0]])
        >>> linear_datamodeling_score(predicted, predicted.square())[0]
        tensor(1., dtype=torch.float64)
    """
    observed = _average_seeds(observed)
    _check(predicted, observed)
    if len(predicted) < 2 or not 0 < confidence < 1 or bootstrap < 0:
        raise ValueError(
            "The score needs at least 2 subsets, bootstrap >= 0 and 0 < confidence < 1, got "
            f"{len(predicted)}, {bootstrap} and {confidence}."
        )
    score = _average_correlations(predicted, observed)
    if not bootstrap:
        return score, None
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(bootstrap):
        rows = torch.randint(len(predicted), (len(predicted),), generator=generator).to(predicted.device)
        draws.append(_average_correlations(predicted[rows], observed[rows]))
    tail = (1 - confidence) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64, device=score.device)
    spread = torch.stack(draws)
    return score, (spread - spread.mean() + score).quantile(levels).clamp(-1, 1)


class LinearDatamodelingScore(Metric):
    r"""Linear datamodeling score (Park, Georgiev, Ilyas, Leclerc, Madry 2023) as a metric.

    .. math:: \mathrm{LDS} = \frac1Q \sum_q \rho_s\Big(\sum_{n \notin s} \tau(q, n),\; m_s(q)\Big)

    where :math:`\rho_s` is Spearman's correlation over subsets, :math:`m_s(q)` the measurement on query ``q``
    of models retrained on subset ``s`` (averaged over seeds) and :math:`\tau(q, n)` the predicted change of
    :math:`m(q)` when ``n`` is removed. With this sign a right attribution scores positive; scores of a
    library whose sign is the other one must be negated.

    As input to ``forward`` and ``update``: predictions ``(M, Q)`` (or ``scores`` and ``masks`` through
    :meth:`update_from_scores`) and observed values ``(M, Q)`` or ``(M, S, Q)``. Updates add *subsets*; all
    updates, on all processes, are for the same queries. As output of ``compute``: the score, or with
    ``bootstrap`` a dictionary of ``score``, ``lower`` and ``upper``.

    Args:
        bootstrap: number of resamples of the subsets for the interval; 0 gives the score alone.
        confidence: coverage of the interval.
        seed: of the resampling.
        kwargs: passed to :class:`torchmetrics.Metric`.

    Example:
        >>> masks = torch.tensor([[True, True, False], [False, True, True], [True, False, True]])
        >>> scores = torch.tensor([[0.3, 0.1, 0.2]])
        >>> metric = LinearDatamodelingScore()
        >>> metric.update_from_scores(scores, masks, observed=torch.tensor([[2.2], [2.3], [2.1]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    predicted: list[Tensor]
    observed: list[Tensor]

    def __init__(self, bootstrap: int = 0, confidence: float = 0.95, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bootstrap < 0 or not 0 < confidence < 1:
            raise ValueError(
                f"Expected bootstrap >= 0 and 0 < confidence < 1, got {bootstrap} and {confidence}."
            )
        self.bootstrap, self.confidence, self.seed = bootstrap, confidence, seed
        self.add_state("predicted", default=[], dist_reduce_fx="cat")
        self.add_state("observed", default=[], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, observed: Tensor) -> None:
        """Add subsets: ``predicted`` is ``(M, Q)``, ``observed`` ``(M, Q)`` or ``(M, S, Q)``."""
        observed = _average_seeds(observed)
        _check(predicted, observed)
        self.predicted.append(predicted.detach())
        self.observed.append(observed.detach())

    def update_from_scores(self, scores: Tensor, masks: Tensor, observed: Tensor) -> None:
        """Add subsets given by scores ``(Q, N)`` and the examples each subset keeps, ``(M, N)``."""
        self.update(predict_subsets(scores, masks), observed)

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the score over all subsets seen."""
        score, interval = linear_datamodeling_score(
            dim_zero_cat(self.predicted),
            dim_zero_cat(self.observed),
            bootstrap=self.bootstrap,
            confidence=self.confidence,
            seed=self.seed,
        )
        if interval is None:
            return score
        return {"score": score, "lower": interval[0], "upper": interval[1]}
