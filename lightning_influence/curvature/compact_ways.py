"""Ways to answer beside a compact coarse space, and which of them is best for each query.

A way takes the answer ``z`` of a closed form in some length ``t`` and adds directions: ``x = t z + Q c``.
Where the curvature is known exactly, the best way is the one with the smallest residual, as probes see it.
Where it is estimated from random mixtures of columns, directions fit what happened to be drawn, and a
residual in the system that they were fitted to does not tell. Then halves of the mixtures are two estimates
of one matrix, and what is made with either is judged by the other: the expectation of ``x^T A x - 2 x^T v``
is the squared error of ``x`` in the norm of the whole matrix, less a constant.

That norm tells whether directions add to a ``z`` what holds, but not which ``z`` is best: where there is
little curvature it is that of the damping, which scores of training examples see nothing of. So the last form
is taken, whose damping is that of closed forms. On three GPTs (examples/benchmarks/large_auto.py) directions
with it give rank correlations of .62, .46 and .84 with converged scores. With that of the system's own
damping these are .60, .39 and .78, and gains .8, .8 and 1.8 times as large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.linalg.galerkin import GalerkinInverse


@dataclass(frozen=True)
class Form:
    """A closed form's answers in the system that is to be solved.

    Attributes:
        first: place of its first answer among those of all forms.
        factor: of the answers as they are held.
        image: ``[W, Q]^T A z``, ``(Q, s + m S)``.
        along: ``z^T v``, ``(Q,)``.
        curved: ``z^T A z``, ``(Q,)``.
    """

    first: int
    factor: float
    image: Tensor
    along: Tensor
    curved: Tensor


@dataclass(frozen=True)
class Way:
    """One way to answer all queries.

    Attributes:
        form: number of the closed form.
        steps: ``t``, ``(Q,)``.
        coefficients: ``c``, ``(Q, m S)``.
    """

    form: int
    steps: Tensor
    coefficients: Tensor

    def leave(self, forms: Sequence[Form], seen: Tensor, coarse: Tensor) -> Tensor:
        """Return ``W^T (v - A x)``, ``(Q, s)``.

        Args:
            forms: all of them.
            seen: ``W^T v``, ``(Q, s)``.
            coarse: ``W^T A Q``, ``(s, m S)``.
        """
        own = forms[self.form].image[:, : seen.shape[1]]
        return seen - self.steps[:, None] * own - self.coefficients @ coarse.T


@dataclass(frozen=True)
class System:
    """The curvature, or an estimate of it, as far as a space and some answers see it.

    Attributes:
        small: ``Q^T A Q``, ``(m S, m S)`` in float64.
        forms: the answers of closed forms.
    """

    small: Tensor
    forms: Sequence[Form]

    def list_ways(self, right: Tensor, galerkin: GalerkinInverse) -> list[Way]:
        """Return the first form with its correction, and every form in its best length with its own.

        Args:
            right: ``[W, Q]^T v``, ``(Q, s + m S)``.
            galerkin: ``(Q^T A Q)^{-1}``.
        """
        plain = torch.ones_like(self.forms[0].along)
        best = [self._find_best_steps(number, right, galerkin) for number in range(len(self.forms))]
        return [
            self._correct(number, steps, right, galerkin) for number, steps in [(0, plain), *enumerate(best)]
        ]

    def measure(self, way: Way, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x^T v`` and ``x^T A x`` of a way, which may be another system's, ``(Q,)`` each."""
        form, c = self.forms[way.form], way.coefficients
        inner = self._inside(form.image)
        along = way.steps * form.along + (c * self._inside(right)).sum(dim=1)
        curved = way.steps.square() * form.curved + (
            c * (2 * way.steps[:, None] * inner + c @ self.small)
        ).sum(1)
        return along, curved

    def _correct(self, number: int, steps: Tensor, right: Tensor, galerkin: GalerkinInverse) -> Way:
        """Return the way whose ``c`` is best for its ``t``."""
        left = right - steps[:, None] * self.forms[number].image
        return Way(number, steps, galerkin.solve(self._inside(left)))

    def _find_best_steps(self, number: int, right: Tensor, galerkin: GalerkinInverse) -> Tensor:
        """Return the ``t`` that are best in the norm of ``A`` if ``c`` is best for each."""
        form = self.forms[number]
        image = self._inside(form.image)
        inside = galerkin.solve(image)
        rest = form.curved - (inside * image).sum(dim=1)
        steps = (form.along - (inside * self._inside(right)).sum(dim=1)) / rest
        return torch.where((rest > 0) & steps.isfinite(), steps, torch.ones_like(steps))

    def _inside(self, products: Tensor) -> Tensor:
        """Return products with ``Q`` of those with ``[W, Q]``."""
        return products[:, products.shape[1] - len(self.small) :]


def measure_gains(halves: Sequence[System], right: Tensor, precision: torch.dtype) -> Tensor:
    """Judge ways with the last form by curvature that they were not fitted to.

    Args:
        halves: two independent estimates of one system.
        right: ``[W, Q]^T v``, ``(Q, s + m S)``.
        precision: of the vectors that they were computed from.

    Returns:
        ``(x^T v)^2 / x^T A x`` for each way of :meth:`System.list_ways`, and at last for the last form alone,
        ``(ways + 1, Q)``: the larger, the smaller the error in the norm of ``A`` of ``x`` in its best length.
        Ways with another form have -1.
    """
    gains, last = [], len(halves[0].forms) - 1
    ways = [half.list_ways(right, GalerkinInverse(half.small, precision)) for half in halves]
    for pair in zip(*ways, strict=True):
        if pair[0].form != last:
            gains.append(torch.full_like(pair[0].steps, -1.0))
            continue
        told = [other.measure(way, right) for way, other in zip(pair, reversed(halves), strict=True)]
        along, curved = (sum(parts) / 2 for parts in zip(*told, strict=True))
        gains.append(_gain(along, curved))
    forms = [half.forms[-1] for half in halves]
    gains.append(_gain(forms[0].along, (forms[0].curved + forms[1].curved) / 2))
    return torch.stack(gains)


def _gain(along: Tensor, curved: Tensor) -> Tensor:
    return (along.clamp_min(0).square() / curved).nan_to_num(nan=0.0, posinf=0.0)


@dataclass(frozen=True)
class Choice:
    """Which of several ways to answer each query is best, ``(Q,)``, and the length it is best in."""

    best: Tensor
    lengths: Tensor

    def leave(self, remainders: Tensor, seen: Tensor) -> Tensor:
        """Return what is left at probes, ``(Q, s)``, of what is left by every way ``(ways, Q, s)``."""
        left = remainders[self.best, torch.arange(len(seen), device=seen.device)]
        return seen - self.lengths[:, None] * (seen - left)


def choose(
    remainders: Tensor, seen: Tensor, scale: Tensor, tolerance: float, gains: Tensor | None = None
) -> Choice:
    """Choose by what probes see, and by gains.

    Args:
        remainders: what every way leaves, ``(ways, Q, s)``; the first one is taken where it is tolerated.
        seen: what there is, ``(Q, s)``.
        scale: squared norms of the queries, ``(Q,)``.
        tolerance: relative residual.
        gains: from :func:`measure_gains`, ``(ways, Q)``, to choose by among what is better than nothing.

    Returns:
        For each query the best way, in a length other than 1 only where it would be worse than nothing.
    """
    residuals = (remainders.square().mean(dim=2) / scale).sqrt()
    best = residuals.nan_to_num(nan=math.inf).argmin(dim=0)
    if gains is None:
        best = torch.where(residuals[0] > tolerance, best, torch.zeros_like(best))
    else:
        helps = residuals < 1.0
        best = torch.where(helps.any(dim=0), gains.where(helps, -math.inf).argmax(dim=0), best)
    plain = Choice(best, torch.ones_like(scale))
    # What is best in the norm of A may be longer than nothing at all is off in the norm of residuals. Its
    # length is then the one that is best in that norm.
    answers = seen - plain.leave(remainders, seen)
    lengths = (answers * seen).sum(dim=1) / answers.square().sum(dim=1)
    left = (seen - lengths[:, None] * answers).square().mean(dim=1)
    own = residuals.gather(0, best[None])[0]
    long = (own > max(1.0, tolerance)) & (lengths > 0) & (left < own.square() * scale)
    return Choice(best, torch.where(long, lengths, plain.lengths))
