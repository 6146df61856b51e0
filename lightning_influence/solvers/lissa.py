r"""LiSSA with derived hyperparameters.

``u <- u - eta [(H_b + lambda) u - v]`` with a fresh minibatch ``b`` each step (Agarwal et al. 2017; Koh and
Liang 2017). Step, batch and number of steps follow from three numbers of the curvature (Klochkov and Liu
2024): its largest eigenvalue, its trace, and ``kappa`` in ``E[h_x^2] <= kappa Tr(H) H`` for the curvature
``h_x`` of one example. With the sampling noise

.. math:: \nu(b) = \frac{\kappa \mathrm{Tr}(H)}{b} \frac{N - b}{N - 1}

(the last factor because batches are drawn without replacement) the mean square error falls if ``eta < 2 /
(lambda_1 + lambda + nu(b))``. Half of this is the step used here. From ``b = kappa Tr(H) / (lambda_1 +
lambda)`` on, a larger batch gains less than a factor 2 of step; a smaller one only makes steps shorter.

What is predicted beforehand is the cost of both ways to the accuracy asked for: rounds of minibatch steps
(:mod:`.sampled`), each of which leaves about ``sqrt(eta nu / 2)`` of the error as noise, or products over all
examples with Chebyshev steps. The cheaper one is taken. When the damping is tiny relative to the largest
eigenvalue that is the second: ``sqrt(lambda_1 / lambda)`` passes instead of ``lambda_1 / lambda`` steps.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from lightning_influence.errors import DivergenceError
from lightning_influence.solvers.chebyshev import chebyshev, chebyshev_steps
from lightning_influence.solvers.sampled import BatchProduct, Round, sampled_rounds
from lightning_influence.solvers.stopping import Product, Solution

# Each round takes this many time constants 1 / (eta lambda); its second half is averaged.
_TIMES = 4.0
_BIAS = (math.exp(-_TIMES / 2) - math.exp(-_TIMES)) / (_TIMES / 2)
# What a minibatch costs beyond its examples: its own forward pass, loading, vector operations.
_OVERHEAD = 8
_LEAST_TOLERANCE = 1e-12
_WIDENINGS = 4


@dataclass(frozen=True)
class Scale:
    """The numbers of a curvature that LiSSA's hyperparameters follow from.

    Attributes:
        largest: upper bound of ``lambda_1(H)``.
        trace: ``Tr(H)``.
        kappa: ``E[h_x^2] <= kappa Tr(H) H``.
        damping_low: smallest damping of a parameter.
        damping_high: largest damping of a parameter.
        num_examples: ``N``.
    """

    largest: float
    trace: float
    kappa: float
    damping_low: float
    damping_high: float
    num_examples: int

    @property
    def top(self) -> float:
        """``lambda_1 + lambda``."""
        return self.largest + self.damping_high

    def noise(self, batch: int) -> float:
        """``nu(b)``: mean square of a minibatch's curvature error, relative to ``H``."""
        left = (self.num_examples - batch) / max(1, self.num_examples - 1)
        return self.kappa * self.trace / batch * max(0.0, left)

    def stable_step(self, batch: int) -> float:
        """The step at and above which the mean square error does not fall."""
        return 2.0 / (self.top + self.noise(batch))

    @property
    def smallest_batch(self) -> int:
        """``kappa Tr(H) / (lambda_1 + lambda)``, below which steps have to be shorter than half the best."""
        wanted = self.kappa * self.trace / self.top
        return max(1, min(self.num_examples, math.ceil(wanted)))


@dataclass(frozen=True)
class LissaPlan:
    """What LiSSA is going to do, and what it will cost.

    Attributes:
        variant: ``"minibatch"`` or ``"full"``.
        step: ``eta``; the mean of the steps for ``"full"``.
        batch: examples of a product.
        steps: number of steps (of a round).
        tail: how many of the last iterates of a round are averaged.
        rounds: expected number of rounds.
        cost: expected example products, for one right-hand side.
        smallest_batch: see :class:`Scale`.
        why: the choice in words.
    """

    variant: str
    step: float
    batch: int
    steps: int
    tail: int
    rounds: int
    cost: float
    smallest_batch: int
    why: str

    def facts(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)


def plan_lissa(
    scale: Scale, *, tolerance: float = 0.05, batch_size: int | None = None, step_size: float | None = None
) -> LissaPlan:
    """Derive LiSSA's hyperparameters.

    Args:
        scale: the numbers of the curvature.
        tolerance: relative error to reach.
        batch_size: a batch that is asked for; derived if None.
        step_size: a step that is asked for; derived if None.

    Returns:
        The plan.

    Raises:
        DivergenceError: if the step that is asked for diverges, with this batch or with any.
        ValueError: if the damping is not positive, or the batch not of 1 to N examples.
    """
    if not scale.damping_low > 0:
        raise ValueError(
            "Got a damping of 0; LiSSA accepts positive ones, because its number of steps is proportional to "
            "1 / damping. Pass damping=, or use method='cg'."
        )
    if batch_size is not None and not 1 <= batch_size <= scale.num_examples:
        raise ValueError(
            f"Got batch_size={batch_size}; accepted are 1 to {scale.num_examples}, the number of examples."
        )
    tolerance = min(max(tolerance, _LEAST_TOLERANCE), 0.5)
    if step_size is not None:
        _check_step(scale, step_size, batch_size)
    full = _full(scale, tolerance)
    if batch_size is None and step_size is None:
        sampled = min((_sampled(scale, tolerance, b) for b in _batches(scale)), key=lambda plan: plan.cost)
        chosen, other = (sampled, full) if sampled.cost < full.cost else (full, sampled)
        why = f"{chosen.why}; the other way ({other.variant}) would cost {other.cost:.3g}"
        return replace(chosen, why=why)
    batch = scale.num_examples if batch_size is None else batch_size
    if batch >= scale.num_examples and step_size is None:
        return full
    return _sampled(scale, tolerance, batch, step_size)


def warning_of(plan: LissaPlan, scale: Scale) -> str | None:
    """Return what a user who asked for this plan's batch should know before it runs, None if nothing."""
    if plan.batch >= plan.smallest_batch:
        return None
    best = 1.0 / (scale.top + scale.noise(plan.smallest_batch))
    return (
        f"batch_size={plan.batch} is too small for steps of the usual size: kappa Tr(H) / (lambda_1 + damping)"
        f" = {scale.kappa:.3g} * {scale.trace:.3g} / {scale.top:.3g} asks for {plan.smallest_batch}. LiSSA "
        f"takes steps of {plan.step:.3g} instead of {best:.3g}, about {plan.steps * plan.rounds} of them "
        f"({plan.cost:.3g} example products). Raise batch_size, or leave it to be derived."
    )


def lissa(
    product: Product,
    batch_product: BatchProduct,
    vectors: Tensor,
    plan: LissaPlan,
    scale: Scale,
    *,
    tolerance: float = 0.05,
    max_steps: int | None = None,
    seed: int = 0,
    fixed: bool = False,
) -> Solution:
    """Solve ``A X = V`` for a positive semidefinite curvature plus damping.

    Args:
        product: ``A`` (with its damping) over all examples.
        batch_product: the same on minibatches.
        vectors: ``V``, ``(V, P)``.
        plan: from :func:`plan_lissa`.
        scale: what the plan was derived from.
        tolerance: relative residual and relative error to reach.
        max_steps: most steps; by default as many as were derived, with some to spare.
        seed: of the minibatches.
        fixed: whether batch and step were asked for, and so are not changed when they fail.

    Returns:
        The solutions with their true residuals; ``facts`` tells what was done.

    Raises:
        DivergenceError: if the iteration diverges, saying whether the step or the batch is the cause.
    """
    spare = 4 * plan.steps * plan.rounds if max_steps is None else max_steps
    if plan.variant == "full":
        return _run_full(product, vectors, scale, None, tolerance, max_steps)
    regrow = None if fixed else lambda batch: _round(_sampled(scale, tolerance, batch))
    found = sampled_rounds(
        product,
        batch_product,
        vectors,
        _round(plan),
        smallest=scale.damping_low,
        num_examples=scale.num_examples,
        explain=lambda one: _explain(scale, one),
        regrow=regrow,
        max_steps=spare,
        tolerance=tolerance,
        seed=seed,
    )
    if not found.facts["open"] or fixed or max_steps is not None:
        return found
    # More noise than was predicted: products over all examples have none.
    rest = _run_full(product, vectors, scale, found.solutions, tolerance, None)
    facts = {**found.facts, **rest.facts, "open": 0, "finished_by": "full"}
    steps, products = found.steps + rest.steps, found.products + rest.products
    return Solution(rest.solutions, rest.residuals, steps, products, found.history + rest.history, facts)


def _run_full(
    product: Product,
    vectors: Tensor,
    scale: Scale,
    guess: Tensor | None,
    tolerance: float,
    max_steps: int | None,
) -> Solution:
    """Return the Chebyshev iteration, with a wider interval where an eigenvalue turns out to lie above."""
    top = scale.top
    for attempt in range(_WIDENINGS):
        steps = chebyshev_steps(scale.damping_low, top, max(tolerance, _LEAST_TOLERANCE))
        steps = steps if max_steps is None else max_steps
        try:
            found = chebyshev(
                product,
                vectors,
                smallest=scale.damping_low,
                largest=top,
                guess=guess,
                max_steps=steps,
                tolerance=tolerance,
            )
        except DivergenceError:
            if attempt == _WIDENINGS - 1:
                raise
            top *= 2
            continue
        return replace(found, facts={**found.facts, "widened": attempt})
    raise AssertionError


def _full(scale: Scale, tolerance: float) -> LissaPlan:
    steps = chebyshev_steps(scale.damping_low, scale.top, tolerance)
    cost = float(steps * scale.num_examples)
    why = (
        f"{steps} products over all {scale.num_examples} examples with Chebyshev steps, from (lambda_1 + "
        f"damping) / damping = {scale.top / scale.damping_low:.3g}: {cost:.3g} example products"
    )
    step = 2.0 / (scale.top + scale.damping_low)
    return LissaPlan(
        "full", step, scale.num_examples, steps, 1, 1, cost, scale.smallest_batch, why
    )


def _sampled(scale: Scale, tolerance: float, batch: int, step_size: float | None = None) -> LissaPlan:
    step = 1.0 / (scale.top + scale.noise(batch)) if step_size is None else step_size
    steps = max(2, math.ceil(_TIMES / (step * scale.damping_low)))
    left = min(0.95, math.sqrt(step * scale.noise(batch) / 2 + _BIAS**2))
    rounds = max(1, math.ceil(math.log(tolerance) / math.log(left)))
    cost = float(rounds * (steps * (batch + _OVERHEAD) + scale.num_examples))
    why = (
        f"{rounds} rounds of {steps} steps of {step:.3g} on {batch} examples, from lambda_1 + damping = "
        f"{scale.top:.3g} and noise {scale.noise(batch):.3g}, and one product over all examples a round: "
        f"{cost:.3g} example products"
    )
    tail = max(1, steps // 2)
    return LissaPlan("minibatch", step, batch, steps, tail, rounds, cost, scale.smallest_batch, why)


def _round(plan: LissaPlan) -> Round:
    return Round(plan.step, plan.batch, plan.steps, plan.tail)


def _batches(scale: Scale) -> list[int]:
    """Return batches to choose from: multiples of the smallest one, below half of the data."""
    multiples = [scale.smallest_batch * 2**k for k in range(8)]
    return [b for b in multiples if b <= scale.num_examples // 2] or [max(1, scale.num_examples // 2)]


def _check_step(scale: Scale, step: float, batch: int | None) -> None:
    """Refuse a step that diverges.

    Raises:
        DivergenceError: saying whether the step or the batch is the cause, and which would do.
    """
    best = 2.0 / scale.top
    if step >= best:
        raise DivergenceError(
            f"step_size={step:.3g} is too large: LiSSA diverges from 2 / (lambda_1 + damping) = {best:.3g} on,"
            f" whatever the batch. Accepted are smaller ones; {best / 2:.3g} is a good one."
        )
    if batch is not None and step >= scale.stable_step(batch):
        needed = scale.kappa * scale.trace / (2.0 / step - scale.top)
        raise DivergenceError(
            f"batch_size={batch} is too small for step_size={step:.3g}: LiSSA diverges with fewer than kappa "
            f"Tr(H) / (2 / step_size - lambda_1 - damping) = {math.ceil(needed)} examples a batch. Raise "
            f"batch_size, or take steps below {scale.stable_step(batch):.3g}."
        )


def _explain(scale: Scale, one: Round) -> str:
    """Return why a round diverged, as far as the numbers tell."""
    limit = scale.stable_step(one.batch)
    cause = (
        f"the step is too large: it should be below {limit:.3g}"
        if one.step * scale.top >= 2
        else f"the batch is too small for its noise (a step below {limit:.3g} was predicted to be stable): "
        "lambda_1, Tr(H) or kappa was estimated too low"
    )
    return (
        f"LiSSA diverged with steps of {one.step:.3g} on batches of {one.batch} examples; {cause}. Raise "
        "batch_size or the damping, or leave batch and step to be derived."
    )
