"""The influence function of a group (Koh & Liang 2017): all parameters, ``H^{-1} g``."""

from __future__ import annotations

from lightning_influence.edits.directions.base import Problem, register_direction
from lightning_influence.solvers.normal_equations import Solve


@register_direction("if", selects=False)
def influence(problem: Problem) -> Solve:
    """Solve over all parameters; the selection is not looked at.

    Args:
        problem: the linearised edit.

    Returns:
        The vector and the residual of its system.
    """
    return problem.solve(problem.gradient)
