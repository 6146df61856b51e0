"""Descent by limited-memory quasi-Newton steps (L-BFGS; Nocedal 1980, Liu & Nocedal 1989).

Each step costs one gradient: what is learned of the curvature comes from how the gradient changed along the
steps before. Shapes: points, gradients and diagonals are flat, ``(P,)``.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], tuple[float, Tensor] | None]
"""Maps a point to the objective and its gradient; None if they are not finite."""

# Pairs that the inverse Hessian is made of, and how often a step is shortened. Chosen by hand, within the
# usual range of 3 to 20 pairs (Nocedal & Wright 2006).
MEMORY, _MOST_HALVINGS = 10, 8
# The share of the fall that the slope promises which a step has to bring (Armijo 1966). Chosen by hand: the
# usual value, which refuses hardly any step that falls.
_SUFFICIENT = 1e-4


@dataclass
class InverseHessian:
    """An inverse Hessian that maps every ``y`` of its pairs to ``s``, the latest one exactly.

    Attributes:
        diagonal: what it is made of without pairs, up to a factor that the latest pair sets; positive where
            steps are allowed and zero elsewhere.
        pairs: steps ``s`` and the changes ``y`` of the gradient along them, the latest last.
    """

    diagonal: Tensor
    pairs: deque[tuple[Tensor, Tensor]] = field(default_factory=lambda: deque(maxlen=MEMORY))

    def learn(self, step: Tensor, change: Tensor) -> bool:
        """Take a pair in, unless the curvature along it is not positive.

        Args:
            step: ``s``, zero where the diagonal is.
            change: ``y``, of the gradient.

        Returns:
            Whether it was.
        """
        inside = change * (self.diagonal != 0)
        curved = float(step @ inside) > torch.finfo(step.dtype).eps * float(step.norm() * inside.norm())
        if curved:
            self.pairs.append((step, inside))
        return curved

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the product with a vector, by the two-loop recursion."""
        rest = vector * (self.diagonal != 0)
        shares = []
        for step, change in reversed(self.pairs):
            share = (step @ rest) / (step @ change)
            shares.append(share)
            rest = rest - share * change
        product = self.diagonal * rest
        if self.pairs:
            step, change = self.pairs[-1]
            product = product * ((step @ change) / (change @ (self.diagonal * change)))
        for (step, change), share in zip(self.pairs, reversed(shares), strict=True):
            product = product + (share - (change @ product) / (step @ change)) * step
        return product


@dataclass(frozen=True)
class Descent:
    """Where a descent ended.

    Attributes:
        point: the last one accepted.
        objective: its value.
        lengths: share of each quasi-Newton step that was taken.
        evaluations: of the objective and its gradient.
    """

    point: Tensor
    objective: float
    lengths: list[float]
    evaluations: int


def descend(
    evaluate: Evaluate,
    start: Tensor,
    diagonal: Tensor,
    *,
    most: int,
    least_fall: float,
    learned: Iterable[tuple[Tensor, Tensor]] = (),
) -> Descent:
    """Lower an objective until a step no longer pays.

    Args:
        evaluate: the objective and its gradient.
        start: where to begin.
        diagonal: of the first inverse Hessian, see :class:`InverseHessian`.
        most: largest number of steps.
        least_fall: relative fall of the objective in three steps below which the last of them is the last.
        learned: points seen on the way to ``start`` and the gradients there, in order.

    Returns:
        The end; the start if its own values are not finite.
    """
    now = evaluate(start)
    if now is None:
        return Descent(start, float("inf"), [], 1)
    point, (value, gradient), evaluations = start, now, 1
    inverse = InverseHessian(diagonal)
    seen = [*learned, (start, gradient)]
    for (before, old), (after, new) in itertools.pairwise(seen):
        inverse.learn(after - before, new - old)
    lengths: list[float] = []
    values = [value]
    while len(lengths) < most:
        direction = -inverse(gradient)
        slope, length = float(gradient @ direction), 1.0
        if not slope < 0:
            break
        for _ in range(_MOST_HALVINGS):
            found = evaluate(point + length * direction)
            evaluations += 1
            if found is not None and found[0] <= value + _SUFFICIENT * length * slope:
                break
            length *= 0.25 if found is None else shorten(value, slope, length, found[0])
        else:
            break
        inverse.learn(length * direction, found[1] - gradient)
        point, (value, gradient) = point + length * direction, found
        lengths.append(length)
        values.append(value)
        # Three steps are looked at, because a single one may be short and only learn the curvature.
        if len(values) > 3 and values[-4] - value < least_fall * abs(values[-4]):
            break
    return Descent(point, value, lengths, evaluations)


def shorten(value: float, slope: float, length: float, reached: float) -> float:
    """Return the factor that leads to the minimum of the parabola through what was seen, in [.1, .5].

    Args:
        value: at the start.
        slope: there, per unit of length; negative.
        length: of the step that was too long.
        reached: the value at its end.
    """
    return min(0.5, max(0.1, -slope * length / (2 * (reached - value - slope * length))))
