"""What iterative methods share: the damped operator, groups of queries, certificates and notes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_influence.curvature.operators import Damped, GaussNewtonOperator, HessianOperator
from lightning_influence.curvature.stored import StoragePass, StoredGaussNewton
from lightning_influence.linalg.stopping import Solution
from lightning_influence.methods.closed_form import block_inverse, measured_eigenvalues
from lightning_influence.methods.context import note_estimate
from lightning_influence.methods.fitting import fitted_factors
from lightning_influence.methods.method import Gradients, Method, Queries, Solved
from lightning_influence.methods.options import Options, require_choice, require_count, require_number
from lightning_influence.methods.scorers import DenseScorer
from lightning_influence.methods.scoring_passes import Quadratic
from lightning_influence.support.errors import UnsupportedModelError

Operator = GaussNewtonOperator | HessianOperator | StoredGaussNewton

# Most entries of a history that are reported.
_HISTORY = 100


Curvature = Literal["ggn", "hessian"]


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


class Iterative(Method):
    """``(H + lambda I) x = v`` by iteration, for all queries of a group at once.

    Curvature gradients are kept in memory if half of the memory budget holds them; products are then no
    passes. Groups are as large as what is left of the budget allows.
    """

    options: IterationOptions
    #: Vectors of the size of the parameters that a right-hand side takes while it is iterated on.
    vectors_each: ClassVar[int] = 8
    #: Why the exact Hessian is refused, if it is.
    refuses_hessian: ClassVar[str] = ""

    def prepare(self) -> None:
        """Use or fit the factors, and set up the operator."""
        context = self.context
        self._refuse()
        factors = fitted_factors(context)
        self.mean_weight = factors.mean_weight
        damping = context.resolve_damping(factors, "full")
        like = torch.empty(0, device=context.device, dtype=context.dtype)
        self.damping = context.layout.expand(damping, like)
        self.inverse = block_inverse(context.layout, factors, damping, measured_eigenvalues)
        self.curvature = self._operator()
        self.operator = Damped(self.curvature, self.damping)
        self.set_up()

    def set_up(self) -> None:
        """Prepare what the method needs beyond the operator."""

    @abstractmethod
    def iterate(self, vectors: Tensor) -> Solution:
        """Solve for a group of right-hand sides ``(V, P)``."""

    def solve(self, queries: Queries) -> Solved:
        """Return scores of the solutions."""
        solutions, residuals = self.solutions(queries)
        queries.clear()
        return Solved(DenseScorer(self.context.layout.split(solutions)), residuals)

    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor]:
        """Return solutions ``(Q, P)`` and their residuals ``(Q,)``, group after group."""
        vectors = self.context.layout.dense(queries)[0].to(self.damping.dtype)
        groups = torch.split(vectors, self._group_size()) if len(vectors) else (vectors,)
        results = [self.iterate(group) for group in groups]
        residuals = torch.cat([result.residuals for result in results])
        self._report(results, residuals)
        self.mean_weight = self.curvature.mean_weight
        if isinstance(self.curvature, GaussNewtonOperator):
            note_estimate(self.context, self.curvature.estimated)
        return torch.cat([result.solutions for result in results]), residuals

    def quadratic(self) -> Quadratic:
        """Return ``g -> g^T (H + lambda I)^{-1} g``, one solve an example; needs the curvature in memory.

        Raises:
            UnsupportedModelError: if every product is a pass of its own.
        """
        if not isinstance(self.curvature, StoredGaussNewton) or self.context.runner.world_size > 1:
            raise UnsupportedModelError(
                f"Self-influence with method={self.name!r} solves one system for every training example, "
                "which is only done on one process, with the Gauss-Newton matrix, and where its gradients "
                "fit into half of the memory budget. Raise memory_budget=, or use method='ekfac' or 'auto', "
                "which take one pass."
            )
        layout = self.context.layout

        def quadratic(gradients: Gradients) -> tuple[Tensor, Tensor]:
            vectors = layout.dense(gradients)[0].to(self.damping.dtype)
            values, residuals = [], []
            for group in torch.split(vectors, self._group_size()):
                result = self.iterate(group)
                values.append((result.solutions * group).sum(dim=1))
                residuals.append(result.residuals)
                self._note_unsolved(result.residuals, "training examples")
            return torch.cat(values), torch.cat(residuals)

        return quadratic

    def _refuse(self) -> None:
        """Refuse settings that the method has no use for, before anything runs.

        Raises:
            ValueError: naming the methods that have.
        """
        if self.refuses_hessian and self.options.curvature == "hessian":
            raise ValueError(
                f"Got curvature='hessian' with method={self.name!r}; accepted is 'ggn': "
                f"{self.refuses_hessian}. Use method='minres'."
            )

    def _operator(self) -> Operator:
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
        fits = context.runner.all_reduce_sum(torch.tensor([float(not one_pass.fits)]))
        if float(fits):
            context.extra["curvature"] = "Gauss-Newton, a pass a product"
            return GaussNewtonOperator(context, fisher=fisher)
        note_estimate(context, one_pass.estimated)
        stored = one_pass.operator(context.layout, context.train.indices, context.runner.all_reduce_sum)
        context.extra["curvature"] = f"Gauss-Newton, {stored.nbytes / 2**20:.1f} MiB of gradients in memory"
        return stored

    def _group_size(self) -> int:
        """Return how many right-hand sides fit into what is left of the memory budget."""
        held = self.curvature.nbytes if isinstance(self.curvature, StoredGaussNewton) else 0
        each = self.vectors_each * self.context.layout.numel * self.damping.element_size()
        return max(1, (self.options.memory_budget - held) // each)

    def _report(self, results: list[Solution], residuals: Tensor) -> None:
        """Put what the solver did into the diagnostics, and say what is not solved."""
        facts: dict[str, Any] = {
            "steps": [result.steps for result in results],
            "products": sum(result.products for result in results),
            "tolerance": self.options.tolerance,
            "solved": int((residuals <= self.options.tolerance).sum()),
            "largest_residual_by_step": [
                [float(f"{value:.4g}") for value in result.history[:_HISTORY]] for result in results
            ],
        }
        for key in results[0].facts:
            facts[key] = [result.facts.get(key) for result in results]
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
