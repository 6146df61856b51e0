"""LiSSA (Agarwal et al. 2017; Koh and Liang 2017) as it was planned by :mod:`.lissa_plan`.

``u <- u - eta [(H_b + lambda) u - v]`` with a fresh minibatch ``b`` each step, an average over the last
steps, and rounds of refinement; or, where that costs less, products over all examples with Chebyshev steps.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_influence.errors import DivergenceError
from lightning_influence.solvers.chebyshev import chebyshev, chebyshev_steps
from lightning_influence.solvers.lissa_plan import LEAST_TOLERANCE, LissaPlan, Scale, plan_minibatch
from lightning_influence.solvers.sampled import BatchProduct, Round, sampled_rounds
from lightning_influence.solvers.stopping import Product, Solution

# What was derived is multiplied by this where nobody sets a limit.
_SPARE = 4
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
        plan: from :func:`~.lissa_plan.plan_lissa`.
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
    widened: int = 0,
) -> Solution:
    """Run the Chebyshev iteration, with a wider interval where an eigenvalue turns out to lie above.

    Returns:
        The solutions; ``facts["widened"]`` says how often the interval was doubled.

    Raises:
        DivergenceError: if it diverges all the same.
    """
    enough = chebyshev_steps(scale.damping_low, scale.top, max(tolerance, LEAST_TOLERANCE))
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
