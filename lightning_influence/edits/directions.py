"""Directions of an edit: which change of the selected parameters nullifies the examples' gradient.

Generalized influence and its baselines are those of Lyu, Jang, Ryu & Yang (2023), the second-order direction
is that of Basu, You & Feizi (2020); others are registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.linalg.normal_equations import (
    SingularSubsetError,
    SubsetSolution,
    derive_squared_scale,
    draw_start,
    make_normal_product,
    solve_by_lissa,
    solve_densely,
    solve_positive,
)
from lightning_influence.support.errors import InfluenceError

Product = Callable[[Tensor], Tensor]
"""Maps vectors ``(V, P)`` to their products ``(V, P)`` with a symmetric matrix."""

# Below every number that a preconditioner divides by, in single precision too.
_TINY = 1e-30


@dataclass(frozen=True)
class Problem:
    """One linearised edit.

    Attributes:
        product: ``H``, the curvature of the objective after the edit, weight decay included.
        edited_product: the curvature of the removed examples; None if examples are relabelled.
        gradient: ``g``, ``(P,)``: what has to be nullified, a mean over the edited examples.
        image: ``H g``, ``(P,)``.
        share: ``p``, the edited examples' share of the training data's weight.
        mask: ``S``, the parameters that may change, boolean, ``(P,)``.
        squared_norms: estimates of ``(H^2)_ii``, ``(P,)``, for preconditioning.
        damping: added to ``H``; its square to the normal equations.
        definite: whether ``H`` is known to be positive semidefinite.
        solver: how linear systems are solved.
        tolerance: relative residual to stop at.
        max_steps: most iterations.
        seed: of random starts.
    """

    product: Product
    edited_product: Product | None
    gradient: Tensor
    image: Tensor
    share: float
    mask: Tensor
    squared_norms: Tensor
    damping: float
    definite: bool = True
    solver: Literal["cg", "lissa", "dense"] = "cg"
    tolerance: float = 1e-2
    max_steps: int = 40
    seed: int = 0

    @property
    def inverse_diagonal(self) -> Tensor:
        """A rough inverse of the diagonal of ``H + damping I``, zero outside ``S``, ``(P,)``."""
        return self._inverse_diagonal(self.mask)

    def _inverse_diagonal(self, mask: Tensor) -> Tensor:
        return mask.to(self.gradient) / (self.squared_norms.sqrt() + self.damping).clamp_min(_TINY)

    def solve(
        self, right: Tensor, mask: Tensor | None = None, product: Product | None = None
    ) -> SubsetSolution:
        """Solve ``(H_SS + damping I) x = b_S``; by least squares where ``H`` is indefinite.

        Args:
            right: ``b``, ``(P,)``.
            mask: ``S``; every parameter if None.
            product: another matrix than ``H``.

        Returns:
            The solution, zero outside ``S``.

        Raises:
            SingularSubsetError: if the system is singular along the right-hand side.
        """
        mask = torch.ones_like(self.mask) if mask is None else mask
        keep, matrix = mask.to(right), product or self.product

        def damped(vectors: Tensor) -> Tensor:
            inside = vectors * keep
            return (matrix(inside) + self.damping * inside) * keep

        right = right * keep
        if self.solver == "dense":
            return solve_densely(damped, right, mask)
        limits: dict[str, Any] = {"tolerance": self.tolerance, "max_steps": self.max_steps}
        if self.definite:
            inverse = self._inverse_diagonal(mask)
            solve = solve_positive(damped, right, inverse_diagonal=inverse, **limits)
            if solve.definite:
                return check_resolved(solve, self.damping)
        inverse = keep / (self.squared_norms + self.damping**2).clamp_min(_TINY)
        normal = make_normal_product(damped, mask, 0.0)
        solve = solve_positive(normal, damped(right[None])[0], inverse_diagonal=inverse, **limits)
        return check_resolved(solve, self.damping)


def check_resolved(solve: SubsetSolution, damping: float) -> SubsetSolution:
    """Return the solution, unless the system was singular where the right-hand side is not zero.

    Raises:
        SingularSubsetError: if so.
    """
    if solve.unresolved and solve.residual > 0.5:
        raise SingularSubsetError(
            f"The selected parameters are singular at damping {damping:g}: along what is left of the "
            f"gradient (residual {solve.residual:.2f}) they have no curvature. Use a positive damping (the "
            "default derives one), or another selection rule."
        )
    return solve


@dataclass(frozen=True)
class Direction:
    """One way to compute the vector of an edit.

    Attributes:
        name: what users pass as ``method=``.
        function: maps a :class:`Problem` to a :class:`~lightning_influence.edits.SubsetSolution`.
        selects: whether it changes selected parameters only.
    """

    name: str
    function: Callable[[Problem], SubsetSolution]
    selects: bool


_DIRECTIONS: dict[str, Direction] = {}


def register_direction(
    name: str, *, selects: bool = True
) -> Callable[[Callable[[Problem], SubsetSolution]], Callable[[Problem], SubsetSolution]]:
    """Decorator: make a direction available under a name.

    Args:
        name: what users pass as ``method=``.
        selects: whether it changes selected parameters only.

    Returns:
        The decorator; it returns the function unchanged.

    Raises:
        TypeError: if there is no name, or what is decorated is no function.

    Example:
        >>> @register_direction("downhill")
        ... def step_downhill(problem):
        ...     vector = problem.gradient * problem.mask * problem.inverse_diagonal
        ...     return SubsetSolution(vector, residual=0.0, steps=0)
        >>> "downhill" in direction_names()
        True
        >>> _ = _DIRECTIONS.pop("downhill")
    """
    if not isinstance(name, str):
        raise TypeError(
            f"Got register_direction({name!r}); accepted is the name that users pass as method=: "
            f"@register_direction('my_direction')."
        )

    def decorate(function: Callable[[Problem], SubsetSolution]) -> Callable[[Problem], SubsetSolution]:
        if not callable(function):
            raise TypeError(
                f"Got {function!r} to register as direction {name!r}; accepted is a function of a Problem "
                "that returns a SubsetSolution."
            )
        _DIRECTIONS[name] = Direction(name, function, selects)
        return function

    return decorate


def find_direction(name: str) -> Direction:
    """Return the direction of this name.

    Raises:
        ValueError: listing the registered names.
    """
    if not isinstance(name, str) or name not in _DIRECTIONS:
        names = ", ".join(repr(known) for known in direction_names())
        raise ValueError(f"Got method={name!r}; accepted are {names}.")
    return _DIRECTIONS[name]


def direction_names() -> list[str]:
    """Return the registered names, sorted."""
    return sorted(_DIRECTIONS)


@register_direction("if", selects=False)
def solve_influence(problem: Problem) -> SubsetSolution:
    """Solve over all parameters; the selection is not looked at.

    Args:
        problem: the linearised edit.

    Returns:
        The vector and the residual of its system.
    """
    return problem.solve(problem.gradient)


@register_direction("fif")
def solve_frozen(problem: Problem) -> SubsetSolution:
    """Solve within the selected parameters.

    Args:
        problem: the linearised edit.

    Returns:
        The vector and the residual of its system.

    Raises:
        InfluenceError: if the selected parameters have no gradient.
    """
    if not bool((problem.gradient * problem.mask).any()):
        raise InfluenceError(describe_miss(int(problem.mask.sum())))
    return problem.solve(problem.gradient, problem.mask)


@register_direction("gif")
def solve_generalized(problem: Problem) -> SubsetSolution:
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
        raise InfluenceError(describe_miss(int(problem.mask.sum())))
    if problem.solver == "dense":
        return solve_densely(problem.product, problem.gradient, problem.mask, ridge)
    normal = make_normal_product(problem.product, problem.mask, ridge)
    if problem.solver == "lissa":
        nu2 = derive_squared_scale(normal, draw_start(problem.mask, right, problem.seed))
        return solve_by_lissa(normal, right, nu2, tolerance=problem.tolerance, max_steps=problem.max_steps)
    inverse = inside / (problem.squared_norms + ridge).clamp_min(_TINY)
    solve = solve_positive(
        normal, right, inverse_diagonal=inverse, tolerance=problem.tolerance, max_steps=problem.max_steps
    )
    return check_resolved(solve, problem.damping)


def describe_miss(count: int) -> str:
    """Return what to say of a selection that no part of the gradient reaches."""
    return (
        f"The {count:,} selected parameters miss the gradient of the edited examples altogether: "
        "no change of them helps. Use another rule (such as 'gain' or 'highest_gradients') or a larger ratio."
    )


@register_direction("pif")
def solve_projected(problem: Problem) -> SubsetSolution:
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
        raise InfluenceError(describe_miss(int(problem.mask.sum())))
    return replace(full, vector=cut)


@register_direction("second_order", selects=False)
def solve_second_order(problem: Problem) -> SubsetSolution:
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
