"""The exact Hessian, dense, for small models."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightning_influence.curvature.hessian import DenseHessianPass
from lightning_influence.errors import UnsupportedModelError
from lightning_influence.methods.base import register_method
from lightning_influence.methods.dense import DenseMethod, as_factors
from lightning_influence.solvers.definite import definite
from lightning_influence.solvers.exact import DenseSolver, check_size


@register_method("hessian")
class Hessian(DenseMethod):
    """``(|H| + lambda I)^{-1}`` with the dense Hessian ``H`` of the average training loss, in float64.

    The option ``negative_curvature`` says what becomes of negative eigenvalues, which a trained network's
    Hessian has as a rule: ``"absolute"`` (the default, see :func:`~..solvers.definite.definite`), ``"clip"``,
    ``"keep"`` for ``(H + lambda I)^{-1}`` as it is, or ``"refuse"`` for an error where ``H + lambda I`` is
    not positive definite. What was found is in ``diagnostics.extra``. Without negative curvature, all give
    the same.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"curvature", "negative_curvature"})

    def prepare(self) -> None:
        """Sum the matrix in one pass; a model that is too large is refused before it.

        Raises:
            UnsupportedModelError: if the damped Hessian is not positive definite and was to be refused.
        """
        context, options = self.context, self.context.options
        check_size(context.layout.numel, options.max_parameters, "hessian")
        layout = context.layout
        one_pass = DenseHessianPass(context.plan)
        context.run_on_train(one_pass)
        matrix = self._covered(one_pass.result(context.runner.all_reduce_sum), layout)
        self.mean_weight = one_pass.mean_weight
        found = definite(matrix, options.negative_curvature)
        factors = as_factors(context.layout, torch.diagonal(found.magnitude))
        damping = context.layout.expand(context.resolve_damping(factors, "full"), found.matrix)
        self.solver = DenseSolver(found.matrix, damping)
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
