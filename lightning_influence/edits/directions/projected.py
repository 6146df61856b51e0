"""Projected influence function: the influence function cut to the selection, ``(H^{-1} g)_S``."""

from __future__ import annotations

from dataclasses import replace

from lightning_influence.edits.directions.base import Problem, register_direction
from lightning_influence.edits.directions.generalized import nothing_to_gain
from lightning_influence.errors import InfluenceError
from lightning_influence.solvers.normal_equations import Solve


@register_direction("pif")
def projected(problem: Problem) -> Solve:
    """Solve over all parameters, and drop what is not selected.

    Args:
        problem: the linearised edit.

    Returns:
        The vector, and the residual before it was cut.

    Raises:
        InfluenceError: if nothing is left.
    """
    full = problem.solve(problem.gradient)
    cut = full.vector * problem.mask.to(full.vector)
    if not bool(cut.any()):
        raise InfluenceError(nothing_to_gain(int(problem.mask.sum())))
    return replace(full, vector=cut)
