"""How far to go along a direction, from losses on training (or validation) data and never on test data.

A linear model of the loss knows the direction in which a class is forgotten much better than the distance:
the loss of an example that the model is sure of is flat, and its curvature nearly zero. The distance is
therefore looked for by evaluating the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# One-sided 99% of a normal distribution: so many examples of the same kind are expected to be forgotten too.
_QUANTILE = 2.326
_MOST_DOUBLINGS, _BISECTIONS = 14, 3
UNREACHED = (
    "No step makes the model forget the edited examples; the one that comes closest was taken. Allow more "
    "parameters with ratio=, or try another rule. Single examples that others resemble a retrained model "
    "would not forget either: use step='theory' for those."
)


@dataclass(frozen=True)
class Point:
    """The losses at one step.

    Attributes:
        excess: loss of each edited example above the one at which it counts as forgotten, ``(E,)``.
        objective: mean training loss after the edit: of kept and relabelled examples.
    """

    excess: Tensor
    objective: float

    @property
    def margin(self) -> float:
        """The excess that 99% of examples like the edited ones can be expected to have."""
        return float(self.excess.mean()) - _QUANTILE * float(self.excess.std(correction=0))

    @property
    def forgotten(self) -> bool:
        """Whether the edited examples are forgotten, and others like them can be expected to be."""
        return self.margin >= 0.0


Evaluate = Callable[[float], Point | None]
"""Maps a step to its losses; None if they are not finite."""


@dataclass(frozen=True)
class Found:
    """The result of a line search.

    Attributes:
        step: a multiple of the theoretical step; 0 if no step helps.
        reached: whether the aim was reached.
        evaluations: how often the model was evaluated.
        objective: the lowest that was found; NaN if the search was not for one.
    """

    step: float
    reached: bool
    evaluations: int
    objective: float = math.nan


def search_forgetting(evaluate: Evaluate) -> Found:
    """Find the smallest step at which the edited examples are forgotten.

    The step is doubled (or halved) from the theoretical one and then bisected. The smallest is taken because
    the loss on the kept examples rises with the step.

    Args:
        evaluate: the losses at a step.

    Returns:
        The step; the one that came closest if none is enough.
    """
    seen: dict[float, Point | None] = {}

    def forgotten(step: float) -> bool:
        seen[step] = evaluate(step)
        point = seen[step]
        return point is not None and point.forgotten

    high = 1.0
    if forgotten(high):
        low = high / 2
        while low > 2.0**-_MOST_DOUBLINGS and forgotten(low):
            low, high = low / 2, low
    else:
        low, high = high, 2 * high
        while not forgotten(high):
            low, high = high, 2 * high
            if high > 2.0**_MOST_DOUBLINGS or seen[low] is None:
                return _between(forgotten, seen)
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if forgotten(middle) else (middle, high)
    return Found(high, True, len(seen))


def _between(forgotten: Callable[[float], bool], seen: dict[float, Point | None]) -> Found:
    """Look below and between the doublings: too far along, what was forgotten may be known again.

    Returns:
        The step that came closest.
    """
    for halvings in range(1, 7):
        if forgotten(2.0**-halvings):
            return Found(2.0**-halvings, True, len(seen))
    for reach in (0.5, 0.25, 0.125):
        best = _closest(seen)
        for step in (best * 2**-reach, best * 2**reach):
            if best and forgotten(step):
                return Found(step, True, len(seen))
    return Found(_closest(seen), False, len(seen))


def _closest(seen: dict[float, Point | None]) -> float:
    """Return the step that leaves the fewest examples known; of those the one with the best margin."""
    known = {
        step: (int((point.excess < 0).sum()), -point.margin)
        for step, point in seen.items()
        if point is not None
    }
    return min(known, key=lambda step: (*known[step], step)) if known else 0.0


def search_objective(
    evaluate: Evaluate, current: float, start: float = 1.0, reaches: tuple[float, ...] = (1.0, 0.5)
) -> Found:
    """Find the step with the lowest objective, on a scale of powers of two and then by parabolas.

    Args:
        evaluate: the losses at a step.
        current: the objective without a step.
        start: the step to begin with.
        reaches: octaves between the steps of each parabola.

    Returns:
        The step; 0 if every one makes the objective worse.
    """
    seen: dict[float, float] = {}

    def value(step: float) -> float:
        if step not in seen:
            point = evaluate(step)
            seen[step] = math.inf if point is None else point.objective
        return seen[step]

    best = start
    while value(best) >= current and best > 2.0**-_MOST_DOUBLINGS:
        best /= 2
    if value(best) >= current:
        return Found(0.0, False, len(seen), current)
    halved = False
    while value(best / 2) < value(best) and best > 2.0**-_MOST_DOUBLINGS:
        best, halved = best / 2, True
    while not halved and value(2 * best) < value(best) and best < 2.0**_MOST_DOUBLINGS:
        best *= 2
    for reach in reaches:
        candidate = _vertex(value, best, reach)
        best = candidate if value(candidate) < value(best) else best
    return Found(best, True, len(seen), value(best))


def _vertex(value: Callable[[float], float], middle: float, reach: float) -> float:
    """Return the minimum of the parabola through three steps, ``reach`` octaves apart."""
    low, high = value(middle * 2.0**-reach), value(middle * 2.0**reach)
    bend = low - 2 * value(middle) + high
    if not (math.isfinite(bend) and bend > 0):
        return middle * math.pow(2, -reach / 2)
    shift = max(-reach, min(reach, 0.5 * reach * (low - high) / bend))
    return middle * math.pow(2, shift)
