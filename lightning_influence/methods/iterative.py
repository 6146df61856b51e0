"""Methods that iterate on products with the curvature: what they share, and ``cg`` and ``minres``.

They share the damped system, groups of queries, and what is told of the residuals. Products are no passes
where the curvature gradients fit into memory.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.operators import Damped, GaussNewtonOperator, HessianOperator
from lightning_influence.curvature.stored import StoragePass, StoredGaussNewton
from lightning_influence.linalg.conjugate_gradients import conjugate_gradients
from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.minres import minres
from lightning_influence.linalg.stopping import Solution
from lightning_influence.methods.closed_form import invert_blocks, take_eigenvalues
from lightning_influence.methods.coarse_building import CoarseBuilder
from lightning_influence.methods.context import Context, note_estimate
from lightning_influence.methods.fitting import provide_factors
from lightning_influence.methods.method import Gradients, Method, Queries, Solved, register_method
from lightning_influence.methods.options import (
    Options,
    SpaceOptions,
    require_choice,
    require_count,
    require_number,
)
from lightning_influence.methods.scorers import DenseScorer
from lightning_influence.methods.scoring_passes import Quadratic
from lightning_influence.support.errors import UnsupportedModelError

Operator = GaussNewtonOperator | HessianOperator | StoredGaussNewton
Iterate = Callable[[Tensor], Solution]
"""Solves for a group of right-hand sides ``(V, P)``."""

# Most entries of a history that are reported. Chosen by hand: diagnostics are read and saved as text.
_HISTORY = 100

Curvature = Literal["ggn", "hessian"]
Preconditioner = Literal["ekfac", "two_level", "none"]


@dataclass(frozen=True)
class IterationOptions(Options):
    """Options that all iterative methods share.

    Attributes:
        tolerance: relative residual ``||v - (H + damping) x|| / ||v||`` at which a query is solved.
        max_steps: most steps; None for as many as the curvature asks for.
        curvature: ``"ggn"``, or the exact ``"hessian"`` where the method allows it.
    """

    tolerance: float = field(default=1e-3, metadata=require_number())
    max_steps: int | None = field(default=None, metadata=require_count(0))
    curvature: Curvature = field(default="ggn", metadata=require_choice(get_args(Curvature)))


@dataclass(frozen=True)
class System:
    """``H + lambda I``, and an approximate inverse of it.

    Attributes:
        curvature: ``H``.
        damping: ``lambda`` of each parameter, ``(P,)``.
        inverse: EK-FAC's, with the same damping.
    """

    curvature: Operator
    damping: Tensor
    inverse: BlockInverse

    @property
    def operator(self) -> Damped:
        """``H + lambda I``."""
        return Damped(self.curvature, self.damping)

    @property
    def nbytes(self) -> int:
        """Memory that curvature gradients take, in bytes."""
        return self.curvature.nbytes if isinstance(self.curvature, StoredGaussNewton) else 0


class Iterative(Method):
    """``(H + lambda I) x = v`` by iteration, for all queries of a group at once.

    Curvature gradients are kept in memory if half of the memory budget holds them; products are then no
    passes. Groups are as large as what is left of the budget allows.
    """

    in_groups: ClassVar[bool] = True
    options: IterationOptions
    #: Vectors of the size of the parameters that a right-hand side takes while it is iterated on, in the
    #: precision of the model, and while its residual is computed in float64.
    vectors_each: ClassVar[int] = 11
    #: Why the exact Hessian is refused, if it is.
    refuses_hessian: ClassVar[str] = ""
    #: Whether it may not converge without damping.
    needs_damping: ClassVar[bool] = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._prepared: tuple[System, Iterate] | None = None
        self._facts: dict[str, Any] = {
            "steps": [],
            "products": 0,
            "solved": 0,
            "largest_residual_by_step": [],
        }

    @property
    def whole_gauss_newton(self) -> bool:
        """Whether the system is the Gauss-Newton matrix of all layers together."""
        return self.options.curvature == "ggn"

    def prepare(self) -> None:
        """Use or fit the factors, set up the system, and derive what the method needs.

        Raises:
            ValueError: if an option has no meaning for the method, before anything runs.
            UnsupportedModelError: if a rule finds no damping and the method needs one.
        """
        context = self.context
        if self.refuses_hessian and self.options.curvature == "hessian":
            raise ValueError(
                f"Got curvature='hessian' with method={self.name!r}; accepted is 'ggn': "
                f"{self.refuses_hessian}. Use method='minres'."
            )
        factors = provide_factors(context)
        self.mean_weight = factors.mean_weight
        damping = context.resolve_damping(factors, "full")
        if self.needs_damping and isinstance(self.options.damping, str) and not min(damping.values()) > 0:
            raise UnsupportedModelError(
                f"damping={self.options.damping!r} is 0 here, as where all curvature is zero, and "
                f"method={self.name!r} needs a positive one. Pass a number, or use method='minres'."
            )
        like = torch.empty(0, device=context.device, dtype=context.dtype)
        budget = context.options.memory_budget
        inverse = invert_blocks(context.layout, factors, damping, take_eigenvalues, budget)
        system = System(self._choose_operator(), context.layout.expand(damping, like), inverse)
        self._prepared = system, self.set_up(system)

    @abstractmethod
    def set_up(self, system: System) -> Iterate:
        """Derive what the method needs beyond the system, and return what solves for a group."""

    def solve(self, queries: Queries) -> Solved:
        """Solve, and let go of the queries.

        Returns:
            A scorer of the solutions.
        """
        solutions, residuals = self.solutions(queries)
        queries.clear()
        return Solved(DenseScorer(self.context.layout.split(solutions)), residuals)

    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor]:
        """Return solutions ``(Q, P)`` and their residuals ``(Q,)``, group after group."""
        system, iterate = self._get_prepared()
        vectors = self.context.layout.dense(queries)[0].to(system.damping.dtype)
        groups = torch.split(vectors, self._limit_group(system)) if len(vectors) else (vectors,)
        results = [iterate(group) for group in groups]
        residuals = torch.cat([result.residuals for result in results])
        self._report(results, residuals)
        self.mean_weight = system.curvature.mean_weight
        if isinstance(system.curvature, GaussNewtonOperator):
            note_estimate(self.context, system.curvature.estimated)
        return torch.cat([result.solutions for result in results]), residuals

    def quadratic(self) -> Quadratic:
        """Return ``g -> g^T (H + lambda I)^{-1} g``, one solve an example; needs the curvature in memory.

        Raises:
            UnsupportedModelError: if every product is a pass of its own.
        """
        system, iterate = self._get_prepared()
        if not isinstance(system.curvature, StoredGaussNewton) or self.context.runner.world_size > 1:
            raise UnsupportedModelError(
                f"Self-influence with method={self.name!r} solves one system for every training example, "
                "which is only done on one process, with the Gauss-Newton matrix, and where its gradients "
                "fit into half of the memory budget. Raise memory_budget=, or use method='ekfac' or 'auto', "
                "which take one pass."
            )
        layout = self.context.layout

        def quadratic(gradients: Gradients) -> tuple[Tensor, Tensor]:
            vectors = layout.dense(gradients)[0].to(system.damping.dtype)
            values, residuals = [], []
            for group in torch.split(vectors, self._limit_group(system)):
                result = iterate(group)
                values.append((result.solutions * group).sum(dim=1))
                residuals.append(result.residuals)
                self._note_unsolved(result.residuals, "training examples")
            return torch.cat(values), torch.cat(residuals)

        return quadratic

    def _get_prepared(self) -> tuple[System, Iterate]:
        assert self._prepared is not None, "prepare() was not called"
        return self._prepared

    def _choose_operator(self) -> Operator:
        """Return the curvature: in memory where it fits, else as passes."""
        context = self.context
        if self.options.curvature == "hessian":
            context.extra["curvature"] = "Hessian, a pass a product"
            return HessianOperator(context)
        fisher = self.options.fisher or "exact"
        one_pass = StoragePass(
            context.plan,
            limit=self.options.memory_budget // 2,
            num_examples=max(1, context.train.num_examples // context.runner.world_size),
            fisher=fisher,
            seed=self.options.seed,
        )
        context.runner.run(one_pass, context.train)
        # All processes decide alike: a product is a collective operation of all of them.
        fits = context.runner.all_reduce_sum(torch.tensor([float(not one_pass.fits)]))
        if float(fits):
            context.extra["curvature"] = "Gauss-Newton, a pass a product"
            return GaussNewtonOperator(context, fisher=fisher)
        note_estimate(context, one_pass.estimated)
        stored = one_pass.operator(context.layout, context.train.indices, context.runner.all_reduce_sum)
        context.extra["curvature"] = f"Gauss-Newton, {stored.nbytes / 2**20:.1f} MiB of gradients in memory"
        return stored

    def group_size(self) -> int:
        """Return how many queries to solve and score at once: half of the room is for iterating."""
        return self._fit(self._get_prepared()[0], 2 * 3)  # as they were found, as vectors, and solved

    def _limit_group(self, system: System) -> int:
        """Return how many right-hand sides to iterate on at once."""
        return self._fit(system, 2 * self.vectors_each)

    def _fit(self, system: System, vectors: int) -> int:
        """Return how often so many vectors fit into what the curvature leaves of the memory budget."""
        each = vectors * self.context.layout.numel * system.damping.element_size()
        return max(1, (self.options.memory_budget - system.nbytes) // each)

    def _report(self, results: list[Solution], residuals: Tensor) -> None:
        """Put what the solver did into the diagnostics, group after group, and say what is not solved."""
        facts = self._facts
        facts["tolerance"] = self.options.tolerance
        facts["products"] += sum(result.products for result in results)
        facts["solved"] += int((residuals <= self.options.tolerance).sum())
        for result in results:
            history = [float(f"{value:.4g}") for value in result.history[:_HISTORY]]
            told = {"steps": result.steps, "largest_residual_by_step": history, **result.facts}
            for key, value in told.items():
                facts.setdefault(key, []).append(value)
        self.context.extra["solver"] = facts
        self._note_unsolved(residuals, "queries")

    def _note_unsolved(self, residuals: Tensor, subject: str) -> None:
        # A residual of the size of rounding counts as solved: tolerance=0 asks for all steps.
        limit = max(self.options.tolerance, 100 * torch.finfo(residuals.dtype).eps)
        count = int((residuals > limit).sum())
        if count:
            self.context.notes.add(
                f"{count} of {len(residuals)} {subject} were left with a relative residual above the "
                f"tolerance {self.options.tolerance:g} (largest {float(residuals.max()):.2g}) by "
                f"method={self.name!r}. Raise max_steps= or the damping; in float32, about 1e-5 is as far "
                "as most systems go."
            )


@dataclass(frozen=True)
class KrylovOptions(IterationOptions, SpaceOptions):
    """Options of ``"cg"`` and ``"minres"``.

    Attributes:
        preconditioner: EK-FAC, EK-FAC with the coarse space of ``"auto"``, or none.
    """

    max_steps: int = field(default=100, metadata=require_count(0))
    preconditioner: Preconditioner = field(default="ekfac", metadata=require_choice(get_args(Preconditioner)))


class Krylov(Iterative):
    """A Krylov method with the preconditioner that the options name."""

    options: KrylovOptions
    #: Solves for a group: of the product and, by keyword, ``precondition``, ``max_steps`` and ``tolerance``.
    solver: ClassVar[Callable[..., Solution]]

    def set_up(self, system: System) -> Iterate:
        """Choose the preconditioner.

        Returns:
            The solver, with everything but the right-hand sides given.
        """
        name = self.options.preconditioner
        precondition: Product | None = None
        if name == "ekfac":
            precondition = system.inverse.apply
        elif name == "two_level":
            builder = CoarseBuilder(self.context, system.inverse, self.options.most_curvature_examples)
            precondition = builder.correct(system.inverse, builder.find()).precondition
        self.context.extra["preconditioner"] = name
        limits = {"max_steps": self.options.max_steps, "tolerance": self.options.tolerance}
        return partial(type(self).solver, system.operator.product, precondition=precondition, **limits)


@register_method("cg", options=KrylovOptions)
class ConjugateGradients(Krylov):
    """Preconditioned conjugate gradients (Hestenes and Stiefel 1952)."""

    solver = staticmethod(conjugate_gradients)


@register_method("minres", options=KrylovOptions)
class MinimalResidual(Krylov):
    """Preconditioned MINRES (Paige and Saunders 1975), also for an indefinite Hessian."""

    vectors_each: ClassVar[int] = 14
    solver = staticmethod(minres)
