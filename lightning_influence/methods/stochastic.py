"""Methods whose products may come from minibatches: ``astra`` and ``lissa``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.minibatches import measure_example_variance
from lightning_influence.curvature.operators import GaussNewtonOperator, HessianOperator
from lightning_influence.curvature.spectrum import measure_spectrum
from lightning_influence.curvature.stored import StoredGaussNewton, bound_kappa
from lightning_influence.linalg.astra import astra, plan_astra
from lightning_influence.linalg.estimates import draw_vectors
from lightning_influence.linalg.lanczos import measure_preconditioned_spectrum
from lightning_influence.linalg.lissa import LissaPlan, Scale, explain_small_batch, lissa, plan_lissa
from lightning_influence.methods.iterative import Iterate, IterationOptions, Iterative, System
from lightning_influence.methods.method import register_method
from lightning_influence.methods.options import (
    require_count,
    require_number,
)

# Passes over all data, or products with gradients in memory, from which on a user is told beforehand. Chosen
# by hand: other methods answer after a few passes.
_MANY_PASSES, _MANY_PRODUCTS = 200, 2000
# Random vectors that the scale is measured with. Chosen by hand: its error costs steps, but no accuracy.
_PROBES = 4
# Minibatches that the variance of examples is measured from where each is a pass. Chosen by hand, likewise.
_BATCH, _BATCHES = 32, 8


@dataclass(frozen=True)
class AstraOptions(IterationOptions):
    """Options of ``"astra"``.

    Attributes:
        batch_size: examples of a minibatch product; None for all.
        step_size: of the iteration; None to derive it from the curvature.
        momentum: None to derive it from the curvature.
    """

    tolerance: float = field(default=1e-2, metadata=require_number())
    max_steps: int = field(default=300, metadata=require_count(0))
    batch_size: int | None = field(default=None, metadata=require_count(1))
    step_size: float | None = field(default=None, metadata=require_number(positive=True))
    momentum: float | None = field(default=None, metadata=require_number(below=1.0))


@register_method("astra", options=AstraOptions)
class Astra(Iterative):
    """ASTRA (Wang et al. 2025): a stationary iteration that EK-FAC preconditions."""

    options: AstraOptions
    refuses_hessian: ClassVar[str] = "a fixed step diverges along directions of negative curvature"
    needs_damping: ClassVar[bool] = True

    def set_up(self, system: System) -> Iterate:
        """Derive step and momentum from the preconditioned spectrum.

        Returns:
            The iteration with them.

        Raises:
            ValueError: if the damping is not positive.
        """
        options, operator, smallest = self.options, system.operator, float(system.damping.min())
        if not smallest > 0:
            raise ValueError(
                "Got a damping of 0; ASTRA accepts positive ones, because its steps may not converge along "
                "directions without curvature. Pass damping=, or use method='minres'."
            )
        spectrum = measure_preconditioned_spectrum(
            operator.product, system.inverse.apply, system.damping, seed=options.seed
        )
        plan = plan_astra(
            spectrum,
            self.context.train.num_examples,
            step_size=options.step_size,
            momentum=options.momentum,
            batch_size=options.batch_size,
            max_steps=self.options.max_steps,
        )
        self.context.extra["astra"] = plan.facts()
        return lambda vectors: astra(
            operator.product,
            operator.batch_product,
            system.inverse.apply,
            vectors,
            plan,
            num_examples=self.context.train.num_examples,
            smallest=smallest,
            max_steps=self.options.max_steps,
            tolerance=self.options.tolerance,
            seed=options.seed,
        )


@dataclass(frozen=True)
class LiSSAOptions(IterationOptions):
    """Options of ``"lissa"``.

    Attributes:
        tolerance: of the residual, and of the relative error of the solution as well.
        batch_size: examples of a minibatch product; None to derive it from the curvature.
        step_size: of the iteration; None to derive it from the curvature.
    """

    tolerance: float = field(default=0.02, metadata=require_number())
    batch_size: int | None = field(default=None, metadata=require_count(1))
    step_size: float | None = field(default=None, metadata=require_number(positive=True))


@register_method("lissa", options=LiSSAOptions)
class LiSSA(Iterative):
    """LiSSA (Agarwal et al. 2017), with the hyperparameters of Klochkov and Liu (2024)."""

    options: LiSSAOptions
    refuses_hessian: ClassVar[str] = "the derivation needs a positive semidefinite curvature"
    needs_damping: ClassVar[bool] = True

    def set_up(self, system: System) -> Iterate:
        """Measure the curvature's scale, derive the hyperparameters, and say what they will cost.

        Returns:
            The iteration with them.
        """
        context, options, operator = self.context, self.options, system.operator
        scale = _measure_scale(system, options.seed)
        plan = plan_lissa(
            scale,
            tolerance=self.options.tolerance,
            batch_size=options.batch_size,
            step_size=options.step_size,
        )
        numbers = {"lambda_1": scale.largest, "trace": scale.trace, "kappa": scale.kappa}
        context.extra["lissa"] = {**plan.facts(), **numbers}
        note = explain_small_batch(plan, scale) if options.batch_size is not None else None
        if note is not None:
            context.notes.add(note)
        self._announce(plan, plan.cost / scale.num_examples, system)
        return lambda vectors: lissa(
            operator.product,
            operator.batch_product,
            vectors,
            plan,
            scale,
            tolerance=self.options.tolerance,
            max_steps=options.max_steps,
            seed=options.seed,
            fixed=options.batch_size is not None or options.step_size is not None,
        )

    def _announce(self, plan: LissaPlan, passes: float, system: System) -> None:
        """Say beforehand what is expensive, or will not get there."""
        steps, most = plan.steps * plan.rounds, self.options.max_steps
        if most is not None and most < steps:
            self.context.notes.add(
                f"LiSSA needs about {steps} steps for a relative error of {self.options.tolerance:g}, and "
                f"max_steps={most} was asked for; the residuals say how far it came."
            )
        many = _MANY_PRODUCTS if isinstance(system.curvature, StoredGaussNewton) else _MANY_PASSES
        if passes > many:
            self.context.notes.add(
                f"LiSSA is going to take {plan.why}, as many as {passes:.0f} passes over the training data. "
                "A larger damping, a larger memory_budget (which keeps curvature gradients), or method='cg' "
                "or 'auto' costs less."
            )


def _measure_scale(system: System, seed: int) -> Scale:
    """Return what LiSSA's hyperparameters follow from, measured in a few products."""
    curvature, damping = system.curvature, system.damping
    place: dict[str, Any] = {"dtype": damping.dtype, "device": damping.device}
    spectrum = measure_spectrum(curvature.product, curvature.numel, probes=_PROBES, seed=seed, **place)
    top = spectrum.eigenvalues[0]
    random = draw_vectors(_PROBES, curvature.numel, seed + 1, **place)
    directions = torch.cat([spectrum.ritz.vectors(_PROBES), random])
    if isinstance(curvature, StoredGaussNewton):
        trace = curvature.trace()
        forms = (directions * curvature.product(directions)).sum(dim=1)
        variance = bound_kappa(curvature.squared_products(directions), forms, trace)
    else:
        trace = max(spectrum.trace.value, 0.0)
        variance = _measure_variance(curvature, directions, trace, seed)
    return Scale(
        largest=max(top.value + (top.error or 0.0), 0.0),
        trace=trace,
        kappa=variance,
        damping_low=float(damping.min()),
        damping_high=float(damping.max()),
        num_examples=curvature.num_examples,
    )


def _measure_variance(
    curvature: GaussNewtonOperator | HessianOperator, directions: Tensor, trace: float, seed: int
) -> float:
    """Return ``kappa`` from minibatches, which are passes, so that there are few of them."""
    count = min(_BATCH, curvature.num_examples // 2)
    if not count or not trace > 0:
        return 1.0
    found = measure_example_variance(
        curvature, directions, trace, count=count, minibatches=_BATCHES, seed=seed
    )
    return max(found.value, 0.0) + (found.error or 0.0)
