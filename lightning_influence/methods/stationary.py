"""``astra`` and ``lissa``: stationary iterations whose steps are derived from the curvature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.minibatches import example_variance
from lightning_influence.curvature.spectrum import measure_spectrum
from lightning_influence.curvature.stored import StoredGaussNewton, kappa
from lightning_influence.linalg.astra import astra, plan_astra
from lightning_influence.linalg.estimates import draw_vectors
from lightning_influence.linalg.lanczos import measure_preconditioned_spectrum
from lightning_influence.linalg.lissa import Scale, lissa, plan_lissa, warning_of
from lightning_influence.linalg.stopping import Solution
from lightning_influence.methods.iterative import IterationOptions, Iterative
from lightning_influence.methods.method import register_method
from lightning_influence.methods.options import require_count, require_number


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
    """ASTRA (Wang et al. 2025)."""

    options: AstraOptions
    refuses_hessian: ClassVar[str] = "a fixed step diverges along directions of negative curvature"

    def set_up(self) -> None:
        """Derive step and momentum from the preconditioned spectrum.

        Raises:
            ValueError: if the damping is not positive.
        """
        options = self.options
        if not float(self.damping.min()) > 0:
            raise ValueError(
                "Got a damping of 0; ASTRA accepts positive ones, because its steps may not converge along "
                "directions without curvature. Pass damping=, or use method='minres'."
            )
        spectrum = measure_preconditioned_spectrum(
            self.operator.product, self.inverse.apply, self.damping, seed=options.seed
        )
        self.plan = plan_astra(
            spectrum,
            self.context.train.num_examples,
            step_size=options.step_size,
            momentum=options.momentum,
            batch_size=options.batch_size,
            max_steps=self.options.max_steps,
        )
        self.context.extra["astra"] = self.plan.facts()

    def iterate(self, vectors: Tensor) -> Solution:
        """Return solutions of a group of right-hand sides ``(V, P)``."""
        return astra(
            self.operator.product,
            self.operator.batch_product,
            self.inverse.apply,
            vectors,
            self.plan,
            num_examples=self.context.train.num_examples,
            smallest=float(self.damping.min()),
            max_steps=self.options.max_steps,
            tolerance=self.options.tolerance,
            seed=self.options.seed,
        )


# Passes over all data, or products with gradients in memory, from which on a user is told beforehand.
_MANY_PASSES, _MANY_PRODUCTS = 200, 2000
_PROBES = 4
# Minibatches that the variance of examples is measured from where each is a pass.
_BATCH, _BATCHES = 32, 8


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

    def set_up(self) -> None:
        """Measure the curvature's scale, derive the hyperparameters, and say what they will cost."""
        context, options = self.context, self.options
        self.scale = self._scale()
        self.plan = plan_lissa(
            self.scale,
            tolerance=self.options.tolerance,
            batch_size=options.batch_size,
            step_size=options.step_size,
        )
        context.extra["lissa"] = {
            **self.plan.facts(),
            "lambda_1": self.scale.largest,
            "trace": self.scale.trace,
            "kappa": self.scale.kappa,
        }
        note = warning_of(self.plan, self.scale) if options.batch_size is not None else None
        if note is not None:
            context.notes.add(note)
        self._announce()

    def iterate(self, vectors: Tensor) -> Solution:
        """Return solutions of a group of right-hand sides ``(V, P)``."""
        options = self.options
        return lissa(
            self.operator.product,
            self.operator.batch_product,
            vectors,
            self.plan,
            self.scale,
            tolerance=self.options.tolerance,
            max_steps=options.max_steps,
            seed=options.seed,
            fixed=options.batch_size is not None or options.step_size is not None,
        )

    def _announce(self) -> None:
        """Say beforehand what is expensive, or will not get there."""
        plan, options = self.plan, self.options
        steps, passes = plan.steps * plan.rounds, plan.cost / self.scale.num_examples
        if options.max_steps is not None and options.max_steps < steps:
            self.context.notes.add(
                f"LiSSA needs about {steps} steps for a relative error of {self.options.tolerance:g}, and "
                f"max_steps={options.max_steps} was asked for; the residuals say how far it came."
            )
        many = _MANY_PRODUCTS if isinstance(self.curvature, StoredGaussNewton) else _MANY_PASSES
        if passes > many:
            self.context.notes.add(
                f"LiSSA is going to take {plan.why}, as many as {passes:.0f} passes over the training data. "
                "A larger damping, a larger memory_budget (which keeps curvature gradients), or method='cg' "
                "or 'auto' costs less."
            )

    def _scale(self) -> Scale:
        """Return what the hyperparameters follow from, measured in a few products."""
        curvature, seed = self.curvature, self.options.seed
        dtype, device = self.damping.dtype, self.damping.device
        spectrum = measure_spectrum(
            curvature.product, curvature.numel, probes=_PROBES, seed=seed, dtype=dtype, device=device
        )
        top = spectrum.eigenvalues[0]
        random = draw_vectors(_PROBES, curvature.numel, seed + 1, dtype=dtype, device=device)
        directions = torch.cat([spectrum.ritz.vectors(_PROBES), random])
        if isinstance(curvature, StoredGaussNewton):
            trace = curvature.trace()
            forms = (directions * curvature.product(directions)).sum(dim=1)
            variance = kappa(curvature.squared_products(directions), forms, trace)
        else:
            trace = max(spectrum.trace.value, 0.0)
            variance = self._variance(directions, trace)
        return Scale(
            largest=max(top.value + (top.error or 0.0), 0.0),
            trace=trace,
            kappa=variance,
            damping_low=float(self.damping.min()),
            damping_high=float(self.damping.max()),
            num_examples=curvature.num_examples,
        )

    def _variance(self, directions: Tensor, trace: float) -> float:
        """Return ``kappa`` from minibatches, which are passes, so that there are few of them."""
        count = min(_BATCH, self.curvature.num_examples // 2)
        if not count or not trace > 0:
            return 1.0
        found = example_variance(
            self.curvature,
            directions,
            trace,
            count=count,
            minibatches=_BATCHES,
            seed=self.options.seed,
        )
        return max(found.value, 0.0) + (found.error or 0.0)
