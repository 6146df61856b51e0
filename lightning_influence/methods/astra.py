"""``astra``: stationary iterations preconditioned by EK-FAC, with derived step and momentum."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_influence.methods.base import register_method
from lightning_influence.methods.iterative import Iterative
from lightning_influence.solvers.astra import astra, plan_astra
from lightning_influence.solvers.preconditioned import preconditioned_spectrum
from lightning_influence.solvers.stopping import Solution


@register_method("astra")
class Astra(Iterative):
    """ASTRA (Wang et al. 2025)."""

    uses: ClassVar[frozenset[str]] = Iterative.uses | {"batch_size", "step_size", "momentum"}
    default_tolerance: ClassVar[float] = 1e-2
    default_max_steps: ClassVar[int] = 300
    refuses_hessian: ClassVar[str] = "a fixed step diverges along directions of negative curvature"

    def set_up(self) -> None:
        """Derive step and momentum from the preconditioned spectrum.

        Raises:
            ValueError: if the damping is not positive.
        """
        options = self.context.options
        if not float(self.damping.min()) > 0:
            raise ValueError(
                "Got a damping of 0; ASTRA accepts positive ones, because its steps may not converge along "
                "directions without curvature. Pass damping=, or use method='minres'."
            )
        spectrum = preconditioned_spectrum(
            self.operator.product, self.inverse.apply, self.damping, seed=options.seed
        )
        self.plan = plan_astra(
            spectrum,
            self.context.train.num_examples,
            step_size=options.step_size,
            momentum=options.momentum,
            batch_size=options.batch_size,
            max_steps=self.max_steps,
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
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            seed=self.context.options.seed,
        )
