"""``lissa``: LiSSA with step, batch, number of steps and averaging derived from the curvature."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.stored import StoredGaussNewton
from lightning_influence.methods.base import register_method
from lightning_influence.methods.iterative import Iterative
from lightning_influence.solvers.lissa import lissa
from lightning_influence.solvers.lissa_plan import Scale, plan_lissa, warning_of
from lightning_influence.solvers.minibatch_noise import kappa, squares_from_batches
from lightning_influence.solvers.preconditioned import preconditioned_spectrum
from lightning_influence.solvers.stopping import Solution

# Passes over all data, and steps, from which on a user is told the cost before it is spent.
_MANY_PASSES = 200
_PROBES = 8


@register_method("lissa")
class LiSSA(Iterative):
    """LiSSA (Agarwal et al. 2017), with the hyperparameters of Klochkov and Liu (2024)."""

    default_tolerance: ClassVar[float] = 0.02
    refuses_hessian: ClassVar[str] = "the derivation needs a positive semidefinite curvature"

    def set_up(self) -> None:
        """Measure the curvature's scale, derive the hyperparameters, and say what they will cost."""
        context, options = self.context, self.context.options
        self.scale = self._scale()
        self.plan = plan_lissa(
            self.scale,
            tolerance=self.tolerance,
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
        options = self.context.options
        return lissa(
            self.operator.product,
            self.operator.batch_product,
            vectors,
            self.plan,
            self.scale,
            tolerance=self.tolerance,
            max_steps=options.max_steps,
            seed=options.seed,
            fixed=options.batch_size is not None or options.step_size is not None,
        )

    def _announce(self) -> None:
        """Say beforehand what is expensive, or will not get there."""
        plan, options = self.plan, self.context.options
        steps, passes = plan.steps * plan.rounds, plan.cost / self.scale.num_examples
        if options.max_steps is not None and options.max_steps < steps:
            self.context.notes.add(
                f"LiSSA needs about {steps} steps for a relative error of {self.tolerance:g}, and "
                f"max_steps={options.max_steps} was asked for; the residuals say how far it came."
            )
        stored = isinstance(self.curvature, StoredGaussNewton)
        if passes > _MANY_PASSES and not stored:
            self.context.notes.add(
                f"LiSSA is going to take {plan.why}, as many as {passes:.0f} passes over the training data. "
                "A larger damping, a larger memory_budget (which keeps curvature gradients), or method='cg' "
                "or 'auto' costs less."
            )

    def _scale(self) -> Scale:
        """Return what the hyperparameters follow from, measured in a few products."""
        curvature, seed = self.curvature, self.context.options.seed
        spectrum = preconditioned_spectrum(
            self.operator.product, lambda v: v, self.damping, steps=12, probes=_PROBES, seed=seed
        )
        low, high = float(self.damping.min()), float(self.damping.max())
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(_PROBES, curvature.numel, generator=generator).to(self.damping)
        directions = torch.cat([directions, curvature.product(directions)])
        directions = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-30)
        if isinstance(curvature, StoredGaussNewton):
            trace = curvature.trace()
            forms = (directions * curvature.product(directions)).sum(dim=1)
            squares = curvature.squared_products(directions)
        else:
            trace = max(spectrum.trace - float(self.damping.sum()), 0.0)
            squares, forms = squares_from_batches(
                curvature.product, curvature.batch_product, directions, curvature.num_examples, seed=seed
            )
        largest = max(spectrum.largest - low, 0.0)
        examples = self.context.train.num_examples
        return Scale(largest, trace, kappa(squares, forms, trace), low, high, examples)
