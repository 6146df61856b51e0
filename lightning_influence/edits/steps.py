"""How far an edit goes: by theory, as given, or looked for by evaluating the model along the direction.

A linear model of the loss knows the direction in which a class is forgotten much better than the distance:
the loss of an example that the model is sure of is flat, and its curvature nearly zero. The distance is
therefore looked for by evaluating the model, on training (or validation) data and never on test data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.edits.losses import LossPass, ValuePass
from lightning_influence.edits.start import Start
from lightning_influence.linalg.descent import shorten
from lightning_influence.support.errors import InfluenceError, NonFiniteError

# One-sided 99% of a normal distribution: so many examples of the same kind are expected to be forgotten too.
_QUANTILE = 2.326
# Chosen by hand: a step is looked for between 2^-14 and 2^14 times the theoretical one, beyond which losses
# overflow or do not change any more, and then to an eighth of an octave.
_MOST_DOUBLINGS, _BISECTIONS = 14, 3
# Chosen by hand, like that of a descent: eight halvings leave less than half a percent of a step.
_MOST_SHORTENINGS = 8
# Relative differences of losses that mean nothing: ten times the rounding of single precision.
_NOISE = 1e-6
UNREACHED = (
    "No step makes the model forget the edited examples; the one that comes closest was taken. Allow more "
    "parameters with ratio=, or try another rule. Single examples that others resemble a retrained model "
    "would not forget either: use step='theory' for those."
)


@dataclass(frozen=True)
class Outcome:
    """Mean losses at some weights, over all examples.

    Attributes:
        edited: of the edited examples, at their new targets if they have any.
        kept: of the kept ones, or of the validation data.
        share: of the edited examples in the weight of the training data.
        shrinkage: the term of the weight decay.
    """

    edited: float
    kept: float
    share: float
    shrinkage: float

    @property
    def objective(self) -> float:
        """The training objective after a relabelling."""
        return self.share * self.edited + (1 - self.share) * self.kept + self.shrinkage


class Stepping:
    """Evaluates a module along directions, and chooses steps.

    Args:
        start: where the edit sets out.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._validation_weight = 0.0

    def measure(self, *, first: bool = False) -> Outcome:
        """Return the losses of all examples at the weights that the module has now.

        Args:
            first: whether these are the weights that the edit sets out from, whose losses are known.
        """
        start = self._start
        data, known = start.data, start.losses
        if first:
            edited = known.at(data.edited)
        elif start.validation is None:
            known = known.with_values(self._take_values(None))
            edited = known.at(data.edited)
        else:
            edited = known.at(data.edited).with_values(self._take_values(data.edited))
        if start.validation is None:
            kept = known.at(data.kept).mean()
        else:
            kept = self._measure_validation(first=first)
        shrinkage = 0.0 if start.objective is None else start.objective.shrinkage()
        return Outcome(edited.mean(), kept, start.share, shrinkage)

    def _take_values(self, chosen: Tensor | None) -> Tensor:
        """Return the losses of training examples at the weights that the module has now."""
        start = self._start
        one_pass = ValuePass(start.data, chosen, start.weights.plan)
        start.runner.run(one_pass, start.data.every_loader if chosen is None else start.data.edited_loader)
        return one_pass.take_values()

    def _measure_validation(self, *, first: bool) -> float:
        start = self._start
        if first:
            one_pass = LossPass(start.weights.plan, None)
            start.runner.run(one_pass, start.validation)
            losses = one_pass.result()
            self._validation_weight = float(losses.weights.sum())
            return losses.mean()
        values = ValuePass(None, plan=start.weights.plan)
        start.runner.run(values, start.validation)
        return float(values.take_values().sum()) / self._validation_weight

    def settle(self, change: Tensor, before: Outcome) -> tuple[float, Outcome]:
        """Shorten the change of a relabelling until its objective over all examples is not above the old one.

        Args:
            change: of the weights, ``(P,)``; the module keeps what is left of it.
            before: the losses without it.

        Returns:
            The share of the change that is left, and the losses with it.

        Raises:
            InfluenceError: if no share of it helps.
        """
        objective = self._start.objective
        assert objective is not None
        share, slope = 1.0, objective.slope(change)
        for _ in range(_MOST_SHORTENINGS):
            self._start.weights.move(share * change)
            try:
                now = self.measure()
            except NonFiniteError:
                share *= 0.25
                continue
            if now.objective <= before.objective + _NOISE * abs(before.objective):
                return share, now
            share *= shorten(before.objective, slope, share, now.objective) if slope < 0 else 0.5
        raise InfluenceError(
            "The change that lowers the loss of a sample of the training set raises that of all of it. Pass "
            "curvature_examples=None, which measures every step on all examples, or try a larger ratio or "
            "damping."
        )

    def choose(self, change: Tensor, unit: Tensor, *, again: bool = False, precise: bool = True) -> Found:
        """Choose a multiple of a change.

        Args:
            change: of the weights so far, ``(P,)``, at which the module is before and afterwards.
            unit: the theoretical step, ``(P,)``.
            again: whether a step was made before.
            precise: whether a search for the lowest objective goes on below powers of two.

        Returns:
            The step.

        Raises:
            LossCaptureError: if it is not known which loss counts as forgotten.
        """
        step = self._start.options.step
        if step != "search":
            length = 1.0 if step == "theory" else float(step)
            found = self._lower(change, unit, length) if again else Found(length, True, 0)
        elif self._start.forgets:
            found = search_forgetting(self._prepare_forgetting(change, unit))
        else:
            found = self._search_objective(change, unit, precise)
        self._start.weights.move(change)
        return found

    def _lower(self, change: Tensor, unit: Tensor, step: float) -> Found:
        """Return the step, halved until it lowers the objective, as a Newton step of a network need not."""
        objective = self._start.objective
        assert objective is not None
        current = objective.value(change)
        for halvings in range(_MOST_SHORTENINGS):
            if objective.value(change + step * unit) < current:
                return Found(step, True, halvings + 1)
            step /= 2
        return Found(0.0, False, _MOST_SHORTENINGS)

    def _prepare_forgetting(self, change: Tensor, unit: Tensor) -> Evaluate:
        """Return what tells the losses of the edited examples at a step, and leaves the module there."""
        start = self._start
        given, edited = start.options.forgotten_loss, start.losses.at(start.data.edited)
        chance = edited.chance if given is None else given * edited.weights
        move = start.weights.prepare_line(change, unit)
        one_pass = ValuePass(start.data, start.data.edited, start.weights.plan)

        def evaluate(step: float) -> Point | None:
            move(step)
            try:
                start.runner.run(one_pass, start.data.edited_loader)
                return Point(one_pass.take_values() - chance, 0.0)
            except NonFiniteError:
                one_pass.clear()
                return None

        return evaluate

    def _search_objective(self, change: Tensor, unit: Tensor, precise: bool) -> Found:
        objective = self._start.objective
        assert objective is not None

        def evaluate(step: float) -> Point:
            return Point(torch.zeros(0), objective.value(change + step * unit))

        # A power of two will do where a descent follows.
        return search_objective(evaluate, objective.value(change), reaches=(1.0, 0.5) if precise else ())


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
                return _search_between(forgotten, seen)
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if forgotten(middle) else (middle, high)
    return Found(high, True, len(seen))


def _search_between(forgotten: Callable[[float], bool], seen: dict[float, Point | None]) -> Found:
    """Look below and between the doublings: too far along, what was forgotten may be known again.

    Returns:
        The step that came closest.
    """
    for halvings in range(1, 7):
        if forgotten(2.0**-halvings):
            return Found(2.0**-halvings, True, len(seen))
    for reach in (0.5, 0.25, 0.125):
        best = _find_closest(seen)
        for step in (best * 2**-reach, best * 2**reach):
            if best and forgotten(step):
                return Found(step, True, len(seen))
    return Found(_find_closest(seen), False, len(seen))


def _find_closest(seen: dict[float, Point | None]) -> float:
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
        candidate = _find_vertex(value, best, reach)
        best = candidate if value(candidate) < value(best) else best
    return Found(best, True, len(seen), value(best))


def _find_vertex(value: Callable[[float], float], middle: float, reach: float) -> float:
    """Return the minimum of the parabola through three steps, ``reach`` octaves apart."""
    low, high = value(middle * 2.0**-reach), value(middle * 2.0**reach)
    bend = low - 2 * value(middle) + high
    if not (math.isfinite(bend) and bend > 0):
        return middle * math.pow(2, -reach / 2)
    shift = max(-reach, min(reach, 0.5 * reach * (low - high) / bend))
    return middle * math.pow(2, shift)
