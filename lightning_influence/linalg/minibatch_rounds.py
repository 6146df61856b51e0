"""Iterations with minibatch products, made exact by rounds of refinement.

A round approximately solves ``A d = r`` for the true residual ``r = v - A x`` of the answer so far, by
``u <- u - step P^{-1} [(H_b + lambda) u - r]`` with a fresh batch ``b`` each step and an average over the
last steps; then ``x <- x + w d``. Written in ``x`` this is a gradient with control variate (SVRG, Johnson and
Zhang 2013): minibatch noise is proportional to what is still missing, so the rounds converge to the exact
solution where a single run stops at its noise. The one full product of a round gives the true residual and,
at no further cost, the best length ``w`` of each query's step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.stopping import Progress, Solution, bound_errors, compute_remainder
from lightning_influence.support.errors import DivergenceError

BatchProduct = Callable[[Tensor, int, int], Tensor]
"""Maps vectors ``(V, P)``, a number of examples and a seed to products ``(V, P)`` on a random minibatch."""

# An iterate that is longer than the longest possible solution by more than this belongs to an iteration that
# diverges. Chosen by hand, with room for noise; looked at every few steps, because it waits for the device.
_GROWTH, _CHECK_EVERY = 10.0, 8
# A round that leaves more than this of the missing part is too noisy for its batch. Chosen by hand: at .8 a
# digit takes ten rounds.
_SLOW = 0.8
# The error after a round is estimated from how much smaller its correction was than the last round's, times
# this, because the rate is that of one draw. Chosen by hand.
_SAFETY = 2.0


@dataclass(frozen=True)
class Round:
    """How one round iterates.

    Attributes:
        step: ``eta``.
        batch: examples of a minibatch.
        steps: number of steps.
        tail: how many of the last iterates are averaged.
        momentum: share of the last change that is kept.
    """

    step: float
    batch: int
    steps: int
    tail: int
    momentum: float = 0.0


def run_rounds(
    product: Product,
    batch_product: BatchProduct,
    vectors: Tensor,
    plan: Round,
    *,
    smallest: float,
    num_examples: int,
    explain: Callable[[Round], str],
    precondition: Product | None = None,
    regrow: Callable[[int], Round] | None = None,
    max_steps: int = 10_000,
    tolerance: float = 0.05,
    seed: int = 0,
) -> Solution:
    """Solve ``A X = V`` by rounds of minibatch iterations.

    Args:
        product: ``A`` (with its damping) over all examples.
        batch_product: the same on minibatches, with the damping.
        vectors: ``V``, ``(V, P)``.
        plan: how a round iterates.
        smallest: positive lower bound of the eigenvalues of ``A``, such as the damping.
        num_examples: ``N``; batches do not grow beyond half of it.
        explain: why a round of this kind may have diverged, in words.
        precondition: ``P^{-1}``; the identity if None.
        regrow: how a round iterates with a larger batch, after one that diverged or gained little; None keeps
            the batch. Where batches may not grow further, right-hand sides are left open, for the caller to
            use all examples on.
        max_steps: most steps in all.
        tolerance: a right-hand side is done when its relative residual is at most this, and its relative
            error by the bound of :func:`~.stopping.bound_errors` or by the last round's correction.
        seed: of the minibatches.

    Returns:
        The solutions with their true residuals; ``facts`` has rounds, the last batch, example products,
        and how many right-hand sides are open.

    Raises:
        DivergenceError: if a round diverges and its batch may not grow.
    """
    progress, solutions = Progress(vectors, tolerance), torch.zeros_like(vectors)
    remainder, steps, rounds, examples = vectors.clone(), 0, 0, 0
    change = torch.full_like(progress.norms, float("inf"))
    rows = progress.observe(remainder).nonzero().flatten()
    while len(rows) and steps < max_steps:
        plan = replace(plan, steps=max(1, min(plan.steps, max_steps - steps)))
        plan = replace(plan, tail=min(plan.tail, plan.steps))
        correction = _iterate(batch_product, remainder[rows], plan, precondition, smallest, seed + steps)
        steps, examples = steps + plan.steps, examples + plan.steps * plan.batch
        if correction is None:
            if regrow is None:
                raise DivergenceError(explain(plan))
            if 2 * plan.batch > num_examples // 2:
                break
            plan = regrow(2 * plan.batch)
            continue
        image = product(correction)
        rounds += 1
        length = _best_length(correction, image, remainder[rows])
        solutions[rows] += length * correction
        remainder[rows] -= length * image
        before, change[rows] = change[rows], (length * correction).norm(dim=1)
        rate = change[rows] / before
        open_ = progress.observe(remainder[rows], rows)
        error = bound_errors(remainder[rows], solutions[rows], smallest)
        left = change[rows] / solutions[rows].norm(dim=1).clamp_min(torch.finfo(change.dtype).tiny)
        guessed = torch.where((rate > 0) & (rate < 1), _SAFETY * left * rate / (1 - rate), torch.inf)
        open_ |= torch.minimum(error, guessed) > tolerance
        if bool(torch.isfinite(rate).all()) and float(rate.median()) > _SLOW and regrow is not None:
            if 2 * plan.batch > num_examples // 2:
                break
            plan = regrow(2 * plan.batch)
        rows = rows[open_]
    if rounds:  # the recursion would go on falling below what the precision allows
        progress.observe(compute_remainder(product, vectors, solutions))
    facts: dict[str, Any] = {
        "rounds": rounds,
        "batch": plan.batch,
        "open": len(rows),
        "example_products": examples + (rounds + bool(rounds)) * num_examples,
    }
    products = rounds + bool(rounds)
    return Solution(solutions, progress.residuals, steps, products, progress.history, facts)


def _iterate(
    batch_product: BatchProduct,
    right: Tensor,
    plan: Round,
    precondition: Product | None,
    smallest: float,
    seed: int,
) -> Tensor | None:
    """Return the averaged tail of one round from zero, or None if it diverged."""
    longest = _GROWTH * right.norm(dim=1) / smallest
    iterate, velocity, total = torch.zeros_like(right), torch.zeros_like(right), torch.zeros_like(right)
    for number in range(plan.steps):
        # The first product is that of the zero vector.
        residual = batch_product(iterate, plan.batch, seed + number) - right if number else -right
        slope = residual if precondition is None else precondition(residual)
        velocity = plan.momentum * velocity + slope
        iterate = iterate - plan.step * velocity
        if number >= plan.steps - plan.tail:
            total += iterate
        last = number == plan.steps - 1
        if (last or number % _CHECK_EVERY == 0) and not bool((iterate.norm(dim=1) <= longest).all()):
            return None
    return total / plan.tail


def _best_length(correction: Tensor, image: Tensor, right: Tensor) -> Tensor:
    """Return the length that comes closest to the solution in the norm of ``A``, ``(k, 1)``."""
    curvature = (correction * image).sum(dim=1, keepdim=True)
    gain = (correction * right).sum(dim=1, keepdim=True)
    return torch.where(curvature > 0, gain / curvature, torch.zeros_like(gain))
