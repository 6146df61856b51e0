r"""ASTRA (Wang et al. 2025): stationary iterations preconditioned by EK-FAC.

.. math:: \theta \leftarrow \theta - \alpha (P + \lambda)^{-1} [(G_b + \lambda) \theta - v],

with momentum. From zero with ``alpha = 1`` the first step is EK-FAC's answer. Step and momentum follow from
the ends ``mu_1 >= mu_P`` of the preconditioned spectrum (Polyak 1964): with the momentum ``beta`` that is
best for the interval, or any given one, ``alpha = (1 + sqrt(beta))^2 / mu_1`` makes every direction with
``alpha mu >= (1 - sqrt(beta))^2`` shrink by ``sqrt(beta)`` a step, and all others more slowly but surely.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.lanczos import PreconditionedSpectrum
from lightning_influence.linalg.minibatch_rounds import BatchProduct, Round, run_rounds
from lightning_influence.linalg.stopping import Progress, Solution, compute_remainder
from lightning_influence.support.errors import DivergenceError

# Momentum averages over 1 / (1 - beta) steps. Chosen by hand: a memory of more than 20 steps hides what the
# residual says.
_MOST_MOMENTUM = 0.95
# Squared growth of the preconditioned residual that momentum alone cannot explain. Chosen by
# hand.
_GROWTH = 1e4


@dataclass(frozen=True)
class AstraPlan:
    """What ASTRA is going to do.

    Attributes:
        step: ``alpha``.
        momentum: ``beta``.
        batch: examples of a product; ``N`` for all.
        largest: ``mu_1``.
        smallest: ``mu_P``, as far as it was found.
        noise: mean square of a minibatch's preconditioned curvature error, relative to the curvature.
    """

    step: float
    momentum: float
    batch: int
    largest: float
    smallest: float
    noise: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)


def plan_astra(
    spectrum: PreconditionedSpectrum,
    num_examples: int,
    *,
    step_size: float | None = None,
    momentum: float | None = None,
    batch_size: int | None = None,
    max_steps: int = 100,
    kappa: float = 1.0,
) -> AstraPlan:
    """Derive step and momentum.

    Args:
        spectrum: of ``P^{-1} A``.
        num_examples: ``N``.
        step_size: a step that is asked for; derived if None.
        momentum: a momentum that is asked for; derived if None.
        batch_size: examples of a minibatch; all of them if None.
        max_steps: most steps that will be taken; one step alone cannot diverge.
        kappa: ``E[h_x^2] <= kappa Tr(H) H`` in the preconditioned coordinates.

    Returns:
        The plan.

    Raises:
        DivergenceError: if the step that is asked for diverges.
        ValueError: if momentum or batch is out of range.
    """
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"Got momentum={momentum}; accepted are numbers from 0 to below 1.")
    if batch_size is not None and not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"Got batch_size={batch_size}; accepted are 1 to {num_examples}, the number of examples."
        )
    batch = num_examples if batch_size is None else batch_size
    noise = kappa * spectrum.trace / batch * (num_examples - batch) / max(1, num_examples - 1)
    top = spectrum.largest + noise
    if momentum is None:
        ratio = math.sqrt(min(1.0, spectrum.smallest / top))
        momentum = min(_MOST_MOMENTUM, ((1 - ratio) / (1 + ratio)) ** 2) if batch == num_examples else 0.0
    limit = 2.0 * (1.0 + momentum) / top
    if step_size is not None and step_size >= limit and max_steps > 1:
        culprit = "step_size" if step_size >= 2.0 * (1.0 + momentum) / spectrum.largest else "batch_size"
        raise DivergenceError(
            f"step_size={step_size:.3g} with momentum {momentum:.3g} on batches of {batch} examples "
            f"diverges: the largest eigenvalue of the preconditioned curvature is {spectrum.largest:.3g} "
            f"and its minibatch noise {noise:.3g}, so steps have to be below {limit:.3g}. Change {culprit}, "
            "or leave both to be derived."
        )
    step = (1.0 + math.sqrt(momentum)) ** 2 / top if step_size is None else step_size
    return AstraPlan(step, momentum, batch, spectrum.largest, spectrum.smallest, noise)


def astra(
    product: Product,
    batch_product: BatchProduct,
    precondition: Product,
    vectors: Tensor,
    plan: AstraPlan,
    *,
    num_examples: int,
    smallest: float,
    max_steps: int = 100,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Solution:
    """Solve ``A X = V``.

    Args:
        product: ``A`` (with its damping) over all examples.
        batch_product: the same on minibatches.
        precondition: ``P^{-1}``.
        vectors: ``V``, ``(V, P)``.
        plan: from :func:`plan_astra`.
        num_examples: ``N``.
        smallest: positive lower bound of the eigenvalues of ``A``, such as the damping.
        max_steps: most steps.
        tolerance: relative residual at which a right-hand side is solved.
        seed: of the minibatches.

    Returns:
        The solutions with their true residuals.

    Raises:
        DivergenceError: if the iteration diverges, saying whether the step or the batch is the cause.
    """
    if plan.batch < num_examples:
        times = 4.0 / (plan.step * plan.smallest / (1.0 - plan.momentum))
        steps = max(2, min(math.ceil(times), max_steps))
        one = Round(plan.step, plan.batch, steps, max(1, steps // 2), plan.momentum)
        return run_rounds(
            product,
            batch_product,
            vectors,
            one,
            smallest=smallest,
            num_examples=num_examples,
            explain=lambda failed: _explain(plan),
            precondition=precondition,
            max_steps=max_steps,
            tolerance=tolerance,
            seed=seed,
        )
    progress, solutions = Progress(vectors, tolerance), torch.zeros_like(vectors)
    remainder, velocity, steps, products = vectors.clone(), torch.zeros_like(vectors), 0, 0
    rows = progress.observe(remainder).nonzero().flatten()
    first = (vectors * precondition(vectors)).sum(dim=1).clamp_min(torch.finfo(vectors.dtype).tiny)
    grown = torch.zeros_like(first)
    while len(rows) and steps < max_steps:
        slope = precondition(remainder[rows])
        grown[rows] = (slope * remainder[rows]).sum(dim=1) / first[rows]
        if bool((grown > _GROWTH).any()):
            raise DivergenceError(_explain(plan))
        velocity[rows] = plan.momentum * velocity[rows] + slope
        solutions[rows] += plan.step * velocity[rows]
        steps += 1
        remainder[rows] = vectors[rows] - product(solutions[rows])
        rows = rows[progress.observe(remainder[rows], rows)]
    if steps > 1 and len(rows) and bool(((precondition(remainder) * remainder).sum(dim=1) > 4 * first).any()):
        raise DivergenceError(_explain(plan))
    if steps and vectors.dtype != torch.float64:  # the products of the steps were in the answer's precision
        progress.observe(compute_remainder(product, vectors, solutions))
        products += 1
    return Solution(solutions, progress.residuals, steps, products + steps, progress.history)


def _explain(plan: AstraPlan) -> str:
    """Return why the iteration diverged, as far as the numbers tell."""
    limit = 2.0 * (1.0 + plan.momentum)
    if plan.step * plan.largest >= limit:
        cause = f"the step is too large: it should be below {limit / plan.largest:.3g}"
    elif plan.noise > 0:
        cause = "the batch is too small for its noise: raise batch_size, or leave it out to use all examples"
    else:
        cause = (
            f"the largest eigenvalue of the preconditioned curvature was estimated too low "
            f"({plan.largest:.3g}): pass a smaller step_size"
        )
    return (
        f"ASTRA diverged with steps of {plan.step:.3g} and momentum {plan.momentum:.3g} on {plan.batch} "
        f"examples; {cause}."
    )
