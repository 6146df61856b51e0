"""Methods with an explicit dense matrix in float64, for small models: GGN, its blocks, the Hessian."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from lightning_influence.curvature.blocks import Blocks, DenseBlockPass, block_indices
from lightning_influence.curvature.factors import Factors, LayerStatistics
from lightning_influence.curvature.gauss_newton import DenseCurvaturePass
from lightning_influence.curvature.hessian import DenseHessianPass
from lightning_influence.linalg.dense_solve import (
    BlockSolver,
    DenseSolver,
    NegativeCurvature,
    check_size,
    treat_negative_curvature,
)
from lightning_influence.methods.context import note_estimate
from lightning_influence.methods.method import Gradients, Method, Solved, register_method
from lightning_influence.methods.options import Options, require_choice, require_count
from lightning_influence.methods.scorers import DenseScorer
from lightning_influence.methods.scoring_passes import Quadratic
from lightning_influence.model.layers.plan import Layout
from lightning_influence.support.errors import UnsupportedModelError

# Vectors in float64 that a query takes while it is solved and its residual is found.
_VECTORS_EACH = 6


class Solver(Protocol):
    """Solves its system for flat vectors."""

    def solve(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Solutions ``(V, P)`` in float64, and the relative residual of each, ``(V,)``."""
        ...


class DenseMethod(Method):
    """A method whose :meth:`prepare` leaves a solver of the damped system."""

    in_groups: ClassVar[bool] = True
    solver: Solver
    options: DenseOptions

    def group_size(self) -> int:
        """Return how many queries are solved and scored at once: solving takes some vectors in float64."""
        return max(1, self.options.memory_budget // (_VECTORS_EACH * self.context.layout.numel * 8))

    @abstractmethod
    def prepare(self) -> None:
        """Sum the matrix in one pass, decide the damping, make the solver."""

    def solve(self, queries: Gradients) -> Solved:
        """Solve densely, and score training gradients against the solutions."""
        solutions, residuals = self.solutions(queries)
        return Solved(DenseScorer(self.context.layout.split(solutions)), residuals)

    def solutions(self, queries: Gradients) -> tuple[Tensor, Tensor]:
        """Solve densely; the residuals are those of the rounding alone."""
        return self.solver.solve(self.context.layout.dense(queries)[0])

    def quadratic(self) -> Quadratic:
        """Return the function that solves for every example of a batch."""
        layout = self.context.layout

        def quadratic(gradients: Gradients) -> tuple[Tensor, Tensor]:
            vectors = layout.dense(gradients)[0]
            solutions, residuals = self.solver.solve(vectors)
            return (solutions * vectors).sum(dim=1), residuals

        return quadratic

    def _covered(self, matrix: Tensor, layout: Layout) -> Tensor:
        """Return the rows and columns of the layers that are still in the plan.

        Args:
            matrix: ``(P, P)``.
            layout: that of the matrix, before layers were left out.
        """
        names = self.context.plan.layers
        kept = layout.expand({name: float(name in names) for name in layout.shapes}, matrix) > 0
        return matrix if bool(kept.all()) else matrix[kept][:, kept]


def make_factors(layout: Layout, diagonal: Tensor) -> Factors:
    """Return a diagonal ``(P,)`` as statistics, which is what damping rules look at."""
    blocks = layout.split(diagonal)
    layers = {}
    for name, shape in layout.shapes.items():
        statistics = LayerStatistics.zeros(shape, (True, True), device=diagonal.device, dtype=diagonal.dtype)
        statistics.squares, statistics.squares_examples = blocks[name].clone(), 1.0
        layers[name] = statistics
    return Factors(layers=layers)


@dataclass(frozen=True)
class DenseOptions(Options):
    """Options of ``"exact"``.

    Attributes:
        max_parameters: a model with more covered parameters is refused.
    """

    max_parameters: int = field(default=8192, metadata=require_count(1))


@register_method("exact", options=DenseOptions)
class Exact(DenseMethod):
    """``(G + lambda I)^{-1}`` with the dense Gauss-Newton matrix ``G``, in float64.

    With ``fisher="mixed"``, ``"sampled"`` or ``"empirical"`` the matrix is that estimate instead.
    """

    @property
    def whole_gauss_newton(self) -> bool:
        """Whether the system is the Gauss-Newton matrix of all layers together."""
        return True

    def prepare(self) -> None:
        """Sum the matrix in one pass; a model that is too large is refused before it."""
        context, options = self.context, self.options
        check_size(context.layout.numel, options.max_parameters)
        layout = context.layout
        one_pass = DenseCurvaturePass(context.plan, fisher=options.fisher or "exact", seed=options.seed)
        context.run_on_train(one_pass)
        matrix = self._covered(one_pass.result(context.runner.all_reduce_sum), layout)
        self.mean_weight = one_pass.count.mean_weight
        note_estimate(context, one_pass.estimated)
        damping = context.resolve_damping(make_factors(context.layout, torch.diagonal(matrix)), "full")
        # An eigenvalue of a matrix of squares is only as far off as the square of what its roots are.
        rounding = len(matrix) * torch.finfo(context.dtype).eps ** 2
        self.solver = DenseSolver(matrix, context.layout.expand(damping, matrix), rounding)


@dataclass(frozen=True)
class BlockOptions(DenseOptions):
    """Options of ``"block_ggn"``.

    Attributes:
        blocks: one block a layer, or ``"tensor"`` for a layer's weight and bias apart.
    """

    blocks: Blocks = field(default="layer", metadata=require_choice(get_args(Blocks)))


@register_method("block_ggn", options=BlockOptions)
class BlockGGN(DenseMethod):
    """``(G + lambda I)^{-1}`` without the cross terms between layers, or between tensors, in float64.

    It is what EK-FAC approximates: the blocks have their own eigenvectors here, not those of a Kronecker
    product. ``fisher="mixed"``, ``"sampled"`` or ``"empirical"`` replaces the blocks by that estimate.
    """

    options: BlockOptions

    def prepare(self) -> None:
        """Sum the blocks in one pass; a model that is too large is refused before it."""
        context, options = self.context, self.options
        sizes = [len(index) for index in block_indices(context.plan, options.blocks)]
        # As many entries as the largest dense matrix that is accepted.
        check_size(int(sum(size**2 for size in sizes) ** 0.5), options.max_parameters, "block_ggn")
        one_pass = DenseBlockPass(
            context.plan, blocks=options.blocks, fisher=options.fisher or "exact", seed=options.seed
        )
        context.run_on_train(one_pass)
        found = one_pass.result(context.runner.all_reduce_sum)
        blocks = [
            block for block, name in zip(found, one_pass.owners, strict=True) if name in context.plan.layers
        ]
        self.mean_weight = one_pass.count.mean_weight
        note_estimate(context, one_pass.estimated)
        indices = [index.to(found[0].device) for index in block_indices(context.plan, options.blocks)]
        diagonal = _joined([torch.diagonal(block) for block in blocks], indices)
        damping = context.resolve_damping(make_factors(context.layout, diagonal), "closed")
        rounding = len(diagonal) * torch.finfo(context.dtype).eps ** 2
        self.solver = BlockSolver(blocks, indices, context.layout.expand(damping, diagonal), rounding)


def _joined(parts: list[Tensor], indices: list[Tensor]) -> Tensor:
    result = parts[0].new_empty(sum(map(len, indices)))
    for part, index in zip(parts, indices, strict=True):
        result[index] = part
    return result


@dataclass(frozen=True)
class HessianOptions(DenseOptions):
    """Options of ``"hessian"``.

    Attributes:
        negative_curvature: what becomes of negative eigenvalues, which a trained network's Hessian has as a
            rule: ``"absolute"``, ``"clip"``, ``"keep"`` for ``(H + lambda I)^{-1}`` as it is, or ``"refuse"``
            for an error where ``H + lambda I`` is not positive definite.
        curvature: ``"hessian"``, as iterative methods call it.
    """

    negative_curvature: NegativeCurvature = field(
        default="absolute", metadata=require_choice(get_args(NegativeCurvature))
    )
    curvature: Literal["hessian"] = field(default="hessian", metadata=require_choice(("ggn", "hessian")))


@register_method("hessian", options=HessianOptions)
class Hessian(DenseMethod):
    """``(|H| + lambda I)^{-1}`` with the dense Hessian ``H`` of the average training loss, in float64.

    ``negative_curvature`` says what becomes of negative eigenvalues; what was found is in
    ``diagnostics.extra``. Without negative curvature, all choices give the same.
    """

    options: HessianOptions

    def prepare(self) -> None:
        """Sum the matrix in one pass; a model that is too large is refused before it.

        Raises:
            UnsupportedModelError: if the damped Hessian is not positive definite and was to be refused.
        """
        context, options = self.context, self.options
        check_size(context.layout.numel, options.max_parameters, "hessian")
        layout = context.layout
        one_pass = DenseHessianPass(context.plan)
        context.run_on_train(one_pass)
        matrix = self._covered(one_pass.result(context.runner.all_reduce_sum), layout)
        self.mean_weight = one_pass.count.mean_weight
        found = treat_negative_curvature(matrix, options.negative_curvature)
        factors = make_factors(context.layout, torch.diagonal(found.magnitude))
        damping = context.layout.expand(context.resolve_damping(factors, "full"), found.matrix)
        rounding = len(matrix) ** 0.5 * torch.finfo(context.dtype).eps
        self.solver = DenseSolver(found.matrix, damping, rounding)
        if float(damping.min()) > 0 and self.solver.smallest <= self.solver.floor:
            precision = str(context.dtype).removeprefix("torch.")
            context.notes.add(
                f"The Hessian plus the damping ({float(damping.min()):.3g}) has an eigenvalue of about "
                f"{self.solver.smallest:.2g}, and up to {self.solver.floor:.2g} they are rounding of "
                f"{precision}: scores may be dominated by directions without curvature. Raise the damping."
            )
        if not self.solver.is_definite and options.negative_curvature in {"refuse", "keep"}:
            message = (
                f"The Hessian plus the damping ({float(damping.min()):.3g}) is not positive definite: its "
                f"smallest eigenvalue without damping is {found.smallest:.3g}. "
            )
            if options.negative_curvature == "refuse":
                raise UnsupportedModelError(
                    f"{message}Use negative_curvature='absolute', more damping, or method='exact', whose "
                    "Gauss-Newton matrix has no negative curvature."
                )
            context.notes.add(
                f"{message}Scores may be dominated by directions of hardly any curvature; "
                "negative_curvature='absolute' avoids that."
            )
        context.extra["negative_curvature"] = found.describe(options.negative_curvature)
