"""``cg`` and ``minres``: Krylov methods with one sequence of coefficients for each query."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from torch import Tensor

from lightning_influence.curvature.two_level import TwoLevel
from lightning_influence.linalg.conjugate_gradients import conjugate_gradients
from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.minres import minres
from lightning_influence.linalg.stopping import Solution
from lightning_influence.methods.coarse_building import CoarseBuilder
from lightning_influence.methods.iterative import IterationOptions, Iterative
from lightning_influence.methods.method import register_method
from lightning_influence.methods.options import SpaceOptions, require_choice, require_count

Preconditioner = Literal["ekfac", "two_level", "none"]


@dataclass(frozen=True)
class KrylovOptions(IterationOptions, SpaceOptions):
    """Options of ``"cg"`` and ``"minres"``.

    Attributes:
        preconditioner: EK-FAC, EK-FAC with the coarse space of ``"auto"``, or none.
    """

    max_steps: int = field(default=100, metadata=require_count(0))
    preconditioner: Preconditioner = field(default="ekfac", metadata=require_choice(get_args(Preconditioner)))


class Preconditioned(Iterative):
    """A Krylov method with the preconditioner that the options name."""

    options: KrylovOptions

    def set_up(self) -> None:
        """Choose the preconditioner."""
        name = self.options.preconditioner
        self.precondition: Product | None = None
        if name == "ekfac":
            self.precondition = self.inverse.apply
        elif name == "two_level":
            space = CoarseBuilder(self.context, self.inverse, self.options.curvature_examples).find()
            self.precondition = TwoLevel(self.inverse, space).precondition
        self.context.extra["preconditioner"] = name


@register_method("cg", options=KrylovOptions)
class ConjugateGradients(Preconditioned):
    """Preconditioned conjugate gradients (Hestenes and Stiefel 1952)."""

    def iterate(self, vectors: Tensor) -> Solution:
        """Return solutions of a group of right-hand sides ``(V, P)``."""
        return conjugate_gradients(
            self.operator.product,
            vectors,
            precondition=self.precondition,
            max_steps=self.options.max_steps,
            tolerance=self.options.tolerance,
        )


@register_method("minres", options=KrylovOptions)
class MinimalResidual(Preconditioned):
    """Preconditioned MINRES (Paige and Saunders 1975), also for an indefinite Hessian."""

    vectors_each: ClassVar[int] = 14

    def iterate(self, vectors: Tensor) -> Solution:
        """Return solutions of a group of right-hand sides ``(V, P)``."""
        return minres(
            self.operator.product,
            vectors,
            precondition=self.precondition,
            max_steps=self.options.max_steps,
            tolerance=self.options.tolerance,
        )
