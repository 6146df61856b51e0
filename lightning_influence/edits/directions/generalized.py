r"""Generalized influence function (Lyu, Jang, Ryu, Yang 2023): nullify the gradient on *all* parameters.

.. math:: \arg\min_x \|H_{:,S}\, x - g\|_2 = ((H^2)_{SS})^{-1} (H g)_S
"""

from __future__ import annotations

from lightning_influence.edits.directions.base import Problem, register_direction, resolved
from lightning_influence.errors import InfluenceError
from lightning_influence.solvers.modified_lissa import modified_lissa, random_start, squared_scale
from lightning_influence.solvers.normal_equations import (
    Solve,
    conjugate_gradients,
    dense_least_squares,
    normal_product,
)


@register_direction("gif")
def generalized(problem: Problem) -> Solve:
    """Solve the least-squares problem, with the damping's square as a ridge.

    Args:
        problem: the linearised edit.

    Returns:
        The vector and the residual of its normal equations.

    Raises:
        InfluenceError: if the selected parameters see nothing of the gradient.
    """
    ridge = problem.damping**2
    inside = problem.mask.to(problem.gradient)
    right = problem.image * inside
    if not bool(right.any()):
        raise InfluenceError(nothing_to_gain(int(problem.mask.sum())))
    if problem.solver == "dense":
        return dense_least_squares(problem.product, problem.gradient, problem.mask, ridge)
    normal = normal_product(problem.product, problem.mask, ridge)
    if problem.solver == "lissa":
        nu2 = squared_scale(normal, random_start(problem.mask, right, problem.seed))
        return modified_lissa(normal, right, nu2, tolerance=problem.tolerance, max_steps=problem.max_steps)
    inverse = inside / (problem.squared_norms + ridge).clamp_min(1e-30)
    solve = conjugate_gradients(
        normal, right, inverse_diagonal=inverse, tolerance=problem.tolerance, max_steps=problem.max_steps
    )
    return resolved(solve, problem.damping)


def nothing_to_gain(count: int) -> str:
    """Return what to say of a selection that no part of the gradient reaches."""
    return (
        f"The {count:,} selected parameters miss the gradient of the edited examples altogether: "
        "no change of them helps. Use another rule (such as 'gain' or 'highest_gradients') or a larger ratio."
    )
