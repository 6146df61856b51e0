"""``cg`` and ``minres``: Krylov methods with one sequence of coefficients for each query."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_influence.curvature.two_level import TwoLevel
from lightning_influence.linalg.conjugate_gradients import conjugate_gradients
from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.minres import minres
from lightning_influence.linalg.stopping import Solution
from lightning_influence.methods.auto import Auto
from lightning_influence.methods.iterative import Iterative
from lightning_influence.methods.method import register_method


class Preconditioned(Iterative):
    """A Krylov method with the preconditioner that the options name."""

    uses: ClassVar[frozenset[str]] = Iterative.uses | {"preconditioner"}

    def set_up(self) -> None:
        """Choose the preconditioner."""
        name = self.context.options.preconditioner
        self.precondition: Product | None = None
        if name == "ekfac":
            self.precondition = self.inverse.apply
        elif name == "two_level":
            auto = Auto(self.context)
            auto.prepare()
            self.precondition = TwoLevel(self.inverse, auto.space).precondition
        self.context.extra["preconditioner"] = name


@register_method("cg")
class ConjugateGradients(Preconditioned):
    """Preconditioned conjugate gradients (Hestenes and Stiefel 1952)."""

    def iterate(self, vectors: Tensor) -> Solution:
        """Return solutions of a group of right-hand sides ``(V, P)``."""
        return conjugate_gradients(
            self.operator.product,
            vectors,
            precondition=self.precondition,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
        )


@register_method("minres")
class MinimalResidual(Preconditioned):
    """Preconditioned MINRES (Paige and Saunders 1975), also for an indefinite Hessian."""

    vectors_each: ClassVar[int] = 14

    def iterate(self, vectors: Tensor) -> Solution:
        """Return solutions of a group of right-hand sides ``(V, P)``."""
        return minres(
            self.operator.product,
            vectors,
            precondition=self.precondition,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
        )
