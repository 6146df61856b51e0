r"""LiSSA (Agarwal et al. 2017; Koh and Liang 2017), with hyperparameters derived from the curvature.

LiSSA iterates ``u <- u - eta [(H_b + lambda) u - v]`` with a fresh minibatch ``b`` each step. Step, batch and
number of steps follow from three numbers of the curvature (Klochkov and Liu 2024): its largest eigenvalue,
its trace, and ``kappa`` in ``E[h_x^2] <= kappa Tr(H) H`` for the curvature ``h_x`` of one example. With the
sampling noise

.. math:: \nu(b) = \frac{\kappa \mathrm{Tr}(H)}{b} \frac{N - b}{N - 1}

(the last factor because batches are drawn without replacement) one step takes the mean square error to at
most ``(I - eta A)^2 + eta^2 nu H``. It falls if ``eta < 2 / (lambda_1 + lambda + nu(b))``, as in the paper;
and, since the noise is relative to ``H`` and not to ``A = H + lambda I``, already if

.. math:: \eta < \frac{2}{\lambda_1 + \lambda + \nu(b) \lambda_1 / (\lambda_1 + \lambda)},

when the damping is the same for all parameters. Half of this is the step used here. Where the two terms are
equal, at ``b = kappa Tr(H) lambda_1 / (lambda_1 + lambda)^2``, the step is half of that without noise: a
larger batch gains less than a factor 2, a smaller one only makes steps shorter.

The cost of two ways to the accuracy asked for is predicted beforehand, and the cheaper one is taken. One is
rounds of minibatch steps (:mod:`.minibatch_rounds`), each of which averages its last steps and leaves about
``sqrt(eta nu lambda_1 / (2 (lambda_1 + lambda)))`` of the error as noise. The other is products over all
examples with Chebyshev steps: where the damping is tiny beside the largest eigenvalue, it takes
``sqrt(lambda_1 / lambda)`` passes in place of ``lambda_1 / lambda`` steps.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from lightning_influence.linalg.chebyshev import chebyshev, count_chebyshev_steps
from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.minibatch_rounds import BatchProduct, Round, run_rounds
from lightning_influence.linalg.stopping import Solution
from lightning_influence.support.errors import DivergenceError

# Each round takes this many time constants 1 / (eta lambda); its second half is averaged. Chosen by hand: its
# bias, the next line, is then 6% of the error, below the noise of most rounds.
_TIMES = 4.0
_BIAS = (math.exp(-_TIMES / 2) - math.exp(-_TIMES)) / (_TIMES / 2)
# What a minibatch costs beyond its examples, in examples: its own forward pass, loading, vector operations.
# Chosen by hand.
_OVERHEAD = 8
# Nothing in float64 comes closer, so that plans for tolerance=0 stay finite.
LEAST_TOLERANCE = 1e-12


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
        """Return ``nu(b)``, the mean square of a minibatch's curvature error, relative to ``H``."""
        left = (self.num_examples - batch) / max(1, self.num_examples - 1)
        return self.kappa * self.trace / batch * max(0.0, left)

    def stable_step(self, batch: int) -> float:
        """Return the step below which the mean square error falls."""
        return 2.0 / (self.top + self.share * self.noise(batch))

    @property
    def share(self) -> float:
        """The largest share of ``H`` in ``A`` along a direction; 1 for dampings that differ."""
        return self.largest / self.top if self.damping_low == self.damping_high else 1.0

    @property
    def smallest_batch(self) -> int:
        """The batch from which on steps of ``1 / (lambda_1 + lambda)`` are stable."""
        return self.batch_for(self.top / self.share) if self.share > 0 else 1

    def batch_for(self, noise: float) -> int:
        """Return the smallest batch with ``nu(b)`` at most this."""
        one = self.kappa * self.trace
        batch = one * self.num_examples / (noise * (self.num_examples - 1) + one) if one > 0 else 1
        return max(1, min(self.num_examples, math.ceil(batch)))


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
    tolerance = min(max(tolerance, LEAST_TOLERANCE), 0.5)
    if step_size is not None:
        _check_step(scale, step_size, batch_size)
    full = plan_full(scale, tolerance)
    if batch_size is None and step_size is None:
        sampled = min(
            (plan_minibatch(scale, tolerance, b) for b in _batches(scale)), key=lambda plan: plan.cost
        )
        chosen, other = (sampled, full) if sampled.cost < full.cost else (full, sampled)
        why = f"{chosen.why}; the other way ({other.variant}) would cost {other.cost:.3g}"
        return replace(chosen, why=why)
    batch = scale.num_examples if batch_size is None else batch_size
    if batch >= scale.num_examples and step_size is None:
        return full
    return plan_minibatch(scale, tolerance, batch, step_size)


def explain_small_batch(plan: LissaPlan, scale: Scale) -> str | None:
    """Return what a user who asked for this plan's batch should know before it runs, None if nothing."""
    if plan.batch >= plan.smallest_batch:
        return None
    best = scale.stable_step(plan.smallest_batch) / 2
    return (
        f"batch_size={plan.batch} is too small for steps of the usual size: kappa={scale.kappa:.3g}, "
        f"Tr(H)={scale.trace:.3g} and lambda_1 + damping={scale.top:.3g} ask for "
        f"{plan.smallest_batch}. LiSSA takes steps of {plan.step:.3g} instead of {best:.3g}, about "
        f"{plan.steps * plan.rounds} of them ({plan.cost:.3g} example products). Raise batch_size, or leave "
        "it to be derived."
    )


def plan_full(scale: Scale, tolerance: float) -> LissaPlan:
    """Plan products over all examples.

    Args:
        scale: the numbers of the curvature.
        tolerance: relative error to reach.

    Returns:
        The plan.
    """
    steps = count_chebyshev_steps(scale.damping_low, scale.top, tolerance)
    cost = float((steps + 1) * scale.num_examples)
    why = (
        f"{steps} products over all {scale.num_examples} examples with Chebyshev steps, from (lambda_1 + "
        f"damping) / damping = {scale.top / scale.damping_low:.3g}, and one for the true residual: "
        f"{cost:.3g} example products"
    )
    step = 2.0 / (scale.top + scale.damping_low)
    return LissaPlan("full", step, scale.num_examples, steps, 1, 1, cost, scale.smallest_batch, why)


def plan_minibatch(scale: Scale, tolerance: float, batch: int, step_size: float | None = None) -> LissaPlan:
    """Plan rounds of minibatch steps.

    Args:
        scale: the numbers of the curvature.
        tolerance: relative error to reach.
        batch: examples of a minibatch.
        step_size: the step; half of the largest stable one if None.

    Returns:
        The plan.
    """
    step = scale.stable_step(batch) / 2 if step_size is None else step_size
    steps = max(2, math.ceil(_TIMES / (step * scale.damping_low)))
    left = min(0.95, math.sqrt(step * scale.share * scale.noise(batch) / 2 + _BIAS**2))
    rounds = max(1, math.ceil(math.log(tolerance) / math.log(left)))
    cost = float(rounds * steps * (batch + _OVERHEAD) + (rounds + 1) * scale.num_examples)
    why = (
        f"{rounds} rounds of {steps} steps of {step:.3g} on {batch} examples, from lambda_1 + damping = "
        f"{scale.top:.3g} and noise {scale.noise(batch):.3g}, and one product over all examples a round: "
        f"{cost:.3g} example products"
    )
    tail = max(1, steps // 2)
    return LissaPlan("minibatch", step, batch, steps, tail, rounds, cost, scale.smallest_batch, why)


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
            f"step_size={step:.3g} is too large: LiSSA diverges from 2 / (lambda_1 + damping) = {best:.3g} "
            f"on, whatever the batch. Accepted are smaller ones; {best / 2:.3g} is a good one."
        )
    if batch is not None and step >= scale.stable_step(batch):
        needed = scale.batch_for((2.0 / step - scale.top) / scale.share)
        raise DivergenceError(
            f"batch_size={batch} is too small for step_size={step:.3g}: with kappa={scale.kappa:.3g}, "
            f"Tr(H)={scale.trace:.3g} and lambda_1 + damping={scale.top:.3g} it is only known to converge "
            f"from {needed} examples a batch on. Raise batch_size, or take steps below "
            f"{scale.stable_step(batch):.3g}."
        )


# Where nobody sets a limit, the derived number of steps is multiplied by this. Chosen by hand.
_SPARE = 4
# How often the interval of Chebyshev steps is doubled before divergence is an error. Chosen by hand: Lanczos
# does not underestimate a largest eigenvalue 16 times.
_WIDENINGS = 4


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
    spare = _SPARE * plan.steps * plan.rounds if max_steps is None else max_steps
    if plan.variant == "full":
        return _run_full(product, vectors, scale, None, tolerance, max_steps)
    regrow = None if fixed else lambda batch: _round(plan_minibatch(scale, tolerance, batch))
    found = run_rounds(
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
    widened: int = 0,
) -> Solution:
    """Run the Chebyshev iteration, with a wider interval where an eigenvalue turns out to lie above.

    Returns:
        The solutions; ``facts["widened"]`` says how often the interval was doubled.

    Raises:
        DivergenceError: if it diverges all the same.
    """
    enough = count_chebyshev_steps(scale.damping_low, scale.top, max(tolerance, LEAST_TOLERANCE))
    try:
        found = chebyshev(
            product,
            vectors,
            smallest=scale.damping_low,
            largest=scale.top,
            guess=guess,
            enough_steps=enough,
            max_steps=_SPARE * enough if max_steps is None else max_steps,
            tolerance=tolerance,
        )
    except DivergenceError:
        if widened == _WIDENINGS:
            raise
        wider = replace(scale, largest=2.0 * scale.largest)
        return _run_full(product, vectors, wider, guess, tolerance, max_steps, widened + 1)
    return replace(found, facts={**found.facts, "widened": widened})


def _round(plan: LissaPlan) -> Round:
    return Round(plan.step, plan.batch, plan.steps, plan.tail)


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
