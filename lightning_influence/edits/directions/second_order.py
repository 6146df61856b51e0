r"""Second-order group influence (Basu, You, Feizi 2020): counts the removed group's own curvature.

With :math:`H_0 = (1 - p) H + p H_F` the curvature before the removal and
:math:`\theta_1 = \frac{p}{1-p} H_0^{-1} g` the first-order change,

.. math:: \Delta\theta = \theta_1 - \frac{p}{1-p} (I - H_0^{-1} H_F)\, \theta_1,

which on a quadratic objective differs from the retrained parameters by :math:`O(p^3)`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_influence.edits.directions.base import Problem, register_direction
from lightning_influence.errors import InfluenceError
from lightning_influence.solvers.normal_equations import Solve


@register_direction("second_order", selects=False)
def second_order(problem: Problem) -> Solve:
    """Solve twice with the curvature before the removal.

    Args:
        problem: the linearised edit.

    Returns:
        The vector before the scale ``p / (1 - p)``, and the larger of the two residuals.

    Raises:
        InfluenceError: if examples are relabelled: the correction is about removal.
    """
    removed = problem.edited_product
    if removed is None:
        raise InfluenceError(
            "method='second_order' describes the removal of a group; relabelling leaves the number of "
            "examples as it is. Use method='if' or 'gif' to relabel."
        )
    share = problem.share

    def before(vectors: Tensor) -> Tensor:
        return (1 - share) * problem.product(vectors) + share * removed(vectors)

    first = problem.solve(problem.gradient, product=before)
    back = problem.solve(removed(first.vector[None])[0], product=before)
    ratio = share / (1 - share)
    return replace(
        first,
        vector=first.vector - ratio * (first.vector - back.vector),
        residual=max(first.residual, back.residual),
        steps=first.steps + back.steps,
    )
