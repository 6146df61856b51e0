"""Freeze influence function: the other parameters are constants, ``(H_SS)^{-1} g_S``."""

from __future__ import annotations

from lightning_influence.edits.directions.base import Problem, register_direction
from lightning_influence.edits.directions.generalized import nothing_to_gain
from lightning_influence.errors import InfluenceError
from lightning_influence.solvers.normal_equations import Solve


@register_direction("fif")
def freeze(problem: Problem) -> Solve:
    """Solve within the selected parameters.

    Args:
        problem: the linearised edit.

    Returns:
        The vector and the residual of its system.

    Raises:
        InfluenceError: if the selected parameters have no gradient.
    """
    if not bool((problem.gradient * problem.mask).any()):
        raise InfluenceError(nothing_to_gain(int(problem.mask.sum())))
    return problem.solve(problem.gradient, problem.mask)
