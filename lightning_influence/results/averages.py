"""Several attributions as one: averages over models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.results.attributions import Attributions
from lightning_influence.results.diagnostics import Diagnostics


def average_attributions(parts: Iterable[Attributions]) -> Attributions:
    """Average the scores of several models trained alike, for the same queries and training examples.

    What one run happens to learn differs between seeds; the average is nearer to what retraining does on
    average. ``diagnostics.extra["agreement"]`` is the mean correlation of two models' scores of a query: near
    1, one model would have told as much; near 0, no single model's ranking is to be trusted.

    Args:
        parts: attributions with all scores.

    Returns:
        Mean scores in the same unit and sign; residuals are each query's largest, dampings the mean.

    Raises:
        ValueError: if there are none, some have no full scores, or they answer different questions.
        TypeError: if they are no attributions, or one that is in no list.
    """
    parts = _to_list(parts)
    if not parts:
        raise ValueError("Got no attributions; pass at least one.")
    first = parts[0]
    for number, part in enumerate(parts):
        _check_alike(first, part, number)
    mean, agreement = _average([part.scores for part in parts if part.scores is not None])
    diagnostics = _average_diagnostics([part.diagnostics for part in parts], agreement)
    changes: dict[str, Any] = {}
    for name in ("layer_scores", "position_scores"):
        found = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        changes |= {name: torch.stack(found).mean(dim=0)} if found else {}
    return dataclasses.replace(first, scores=mean, diagnostics=diagnostics, **changes)


def _average(scores: Sequence[Tensor]) -> tuple[Tensor, float | None]:
    """Average matrices of scores, a query at a time, so that no further matrix in float64 is needed.

    Returns:
        The mean ``(Q, N)`` in the precision of the first, and the mean correlation over queries and pairs of
        models; None for one model alone.
    """
    mean, count = torch.empty_like(scores[0]), len(scores)
    agreements = torch.empty(len(mean), dtype=torch.float64)
    for row in range(len(mean)):
        models = torch.stack([part[row].double() for part in scores])  # (models, N)
        mean[row] = models.mean(dim=0)
        centred = models - models.mean(dim=1, keepdim=True)
        unit = centred / centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        # The square of a sum holds every pair twice, and the squares.
        agreements[row] = unit.sum(dim=0).square().sum() - unit.square().sum()
    if count < 2:
        return mean, None
    return mean, float(agreements.mean()) / (count * (count - 1))


def _to_list(parts: object) -> list[Attributions]:
    """Return what was passed as a list.

    Raises:
        TypeError: if it is something else than several attributions.
    """
    accepted = "pass several answers to the same question: average_attributions([first, second])."
    if isinstance(parts, Attributions) or not isinstance(parts, Iterable):
        raise TypeError(f"Got one {type(parts).__name__}; {accepted}")
    found = list(parts)
    for number, part in enumerate(found):
        if not isinstance(part, Attributions):
            raise TypeError(f"Got a {type(part).__name__} at position {number}; {accepted}")
    return found


def _check_alike(first: Attributions, part: Attributions, number: int) -> None:
    """Refuse attributions that cannot be added up.

    Raises:
        ValueError: saying what differs.
    """
    if part.scores is None:
        raise ValueError(f"Attributions {number} hold both ends of the rankings only; ask without top_k.")
    pairs = {
        "train_indices": (first.train_indices, part.train_indices),
        "query_indices": (first.query_indices, part.query_indices),
        "query_dataloaders": (first.query_dataloaders, part.query_dataloaders),
    }
    differing = [name for name, (a, b) in pairs.items() if not _equal(a, b)]
    names = ("query_names", "train_names", "layer_names")
    differing += [name for name in names if getattr(first, name) != getattr(part, name)]
    if first.diagnostics.measurement != part.diagnostics.measurement:
        differing.append("the measurement")
    if differing:
        raise ValueError(
            f"Attributions 0 and {number} differ in {', '.join(differing)}; accepted are answers to the same "
            "question by different models."
        )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def _average_diagnostics(parts: Sequence[Diagnostics], agreement: float | None) -> Diagnostics:
    first, count = parts[0], len(parts)
    residuals = [part.residuals for part in parts if part.residuals is not None]
    return dataclasses.replace(
        first,
        damping={
            name: sum(part.damping.get(name, value) for part in parts) / count
            for name, value in first.damping.items()
        },
        damping_origin=f"{first.damping_origin}; mean of {count} models",
        residuals=torch.stack(residuals).amax(dim=0) if len(residuals) == count else None,
        passes=[facts for part in parts for facts in part.passes],
        seconds=sum(part.seconds for part in parts),
        checkpoint=", ".join(part.checkpoint or "the weights in memory" for part in parts),
        warnings=list(dict.fromkeys(warning for part in parts for warning in part.warnings)),
        extra={**first.extra, "models": count, "agreement": agreement},
    )
