"""Least squares over a subset of the coordinates: ``argmin_x ||H[:, S] x - g||^2 + r ||x||^2``.

The minimum solves :math:`((H^2)_{SS} + r I) x = (H g)_S`, which is positive semidefinite whatever the signs
of the eigenvalues of ``H``. Generalized influence functions (Lyu, Jang, Ryu, Yang 2023) are this problem.

Shapes: vectors are flat, ``(P,)``, and zero outside ``S``; ``H`` is a function of ``(V, P)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.support.errors import InfluenceError

Vector = Callable[[Tensor], Tensor]
"""Maps a vector ``(P,)`` to a vector ``(P,)``."""


@dataclass(frozen=True)
class Solve:
    """A solution and how good it is.

    Attributes:
        vector: ``(P,)``.
        residual: ``||b - A x|| / ||b||`` of the system that was solved.
        steps: iterations.
        definite: False if a direction of negative curvature ended the iteration.
        unresolved: True if a direction without curvature ended it.
    """

    vector: Tensor
    residual: float
    steps: int
    definite: bool = True
    unresolved: bool = False


class SingularSubsetError(InfluenceError):
    """The selected parameters do not determine the edit: some combination of them changes no gradient."""


def normal_product(product: Callable[[Tensor], Tensor], mask: Tensor, ridge: float) -> Vector:
    """Return the function ``v -> ((H^2)_SS + r I) v`` on vectors that are zero outside ``S``.

    Args:
        product: ``H`` on ``(V, P)``, symmetric.
        mask: ``S``, boolean, ``(P,)``.
        ridge: ``r``.

    Returns:
        The function.
    """

    def apply(vector: Tensor) -> Tensor:
        return product(product(vector[None]))[0] * mask.to(vector) + ridge * vector

    return apply


def conjugate_gradients(
    product: Vector,
    right: Tensor,
    *,
    inverse_diagonal: Tensor | None = None,
    tolerance: float = 1e-2,
    max_steps: int = 40,
) -> Solve:
    """Solve ``A x = b`` by preconditioned conjugate gradients (Hestenes & Stiefel 1952).

    Args:
        product: ``A``, symmetric and positive semidefinite.
        right: ``b``, ``(P,)``; where it and the preconditioner are zero the solution stays zero.
        inverse_diagonal: the preconditioner, ``(P,)``; positive inside ``S``.
        tolerance: relative residual to stop at.
        max_steps: most products.

    Returns:
        The solution; the one of least norm in the preconditioner's metric if there are several.
    """
    scale = torch.ones_like(right) if inverse_diagonal is None else inverse_diagonal
    solution, remainder = torch.zeros_like(right), right.clone()
    norm = float(right.norm())
    if norm == 0:
        return Solve(solution, 0.0, 0)
    preconditioned = remainder * scale
    direction, energy = preconditioned.clone(), remainder @ preconditioned
    best, best_residual, steps = solution.clone(), 1.0, 0
    definite, unresolved = True, False
    while steps < max_steps and best_residual > tolerance:
        image = product(direction)
        curvature = float(direction @ image)
        steps += 1
        if curvature <= torch.finfo(right.dtype).eps * float(direction.norm() * image.norm()):
            definite, unresolved = curvature >= 0, curvature >= 0
            break
        length = energy / curvature
        solution = solution + length * direction
        remainder = remainder - length * image
        residual = float(remainder.norm()) / norm
        # The residual of conjugate gradients is not monotone: the best iterate is returned.
        if residual < best_residual:
            best, best_residual = solution.clone(), residual
        preconditioned = remainder * scale
        fresh = remainder @ preconditioned
        direction = preconditioned + (fresh / energy) * direction
        energy = fresh
    return Solve(best, best_residual, steps, definite, unresolved)


def dense_least_squares(
    product: Callable[[Tensor], Tensor],
    target: Tensor,
    mask: Tensor,
    ridge: float = 0.0,
    *,
    limit: int = 4096,
) -> Solve:
    """Solve with the columns of ``H`` as a matrix, in float64: the reference for small subsets.

    Args:
        product: ``H`` on ``(V, P)``.
        target: ``g``, ``(P,)``.
        mask: ``S``, boolean, ``(P,)``.
        ridge: ``r``.
        limit: largest accepted ``|S|``.

    Returns:
        The solution.

    Raises:
        ValueError: if the subset is too large.
        SingularSubsetError: if the subset does not determine the solution.
    """
    chosen = mask.nonzero().flatten()
    if len(chosen) > limit:
        raise ValueError(
            f"solver='dense' would form {len(chosen):,} columns of {len(mask):,} numbers; at most {limit:,} "
            "parameters are accepted. Use solver='cg', or a smaller ratio."
        )
    columns = _columns(product, chosen, target).double()  # (S, P): H is symmetric
    gram = columns @ columns.T
    gram.diagonal().add_(ridge)
    values, vectors = torch.linalg.eigh(gram)
    # What a product of this precision cannot tell from zero.
    floor = len(chosen) * torch.finfo(target.dtype).eps * float(values[-1])
    if float(values[0]) <= floor:
        flat = int((values <= floor).sum())
        raise SingularSubsetError(
            f"The {len(chosen):,} selected parameters are singular: {flat:,} combinations of them change no "
            "gradient, so the edit is not determined. Use a positive damping (the default derives one), "
            "another selection rule, or a smaller ratio."
        )
    right = columns @ target.double()
    solution = vectors @ ((vectors.T @ right) / values)
    remainder = right - gram @ solution
    full = torch.zeros_like(target)
    full[chosen] = solution.to(target.dtype)
    norm = float(right.norm())
    return Solve(full, float(remainder.norm()) / norm if norm else 0.0, len(chosen))


def _columns(product: Callable[[Tensor], Tensor], chosen: Tensor, like: Tensor, block: int = 64) -> Tensor:
    """Return the columns of ``H`` at ``chosen``, as rows ``(S, P)``."""
    parts = []
    for part in torch.split(chosen, block):
        units = like.new_zeros(len(part), len(like))
        units[torch.arange(len(part), device=like.device), part] = 1.0
        parts.append(product(units))
    return torch.cat(parts)


def largest_eigenvalue(product: Vector, start: Tensor, steps: int = 10) -> float:
    """Estimate the eigenvalue of largest absolute value from below, by Lanczos (1950).

    Args:
        product: a symmetric matrix.
        start: a vector ``(P,)`` with some part along the eigenvector sought, such as a random one.
        steps: products.

    Returns:
        Its absolute value; 0 if the matrix maps ``start`` to zero.
    """
    if not bool(start.any()):
        return 0.0
    basis, images = [start / start.norm().clamp_min(torch.finfo(start.dtype).tiny)], []
    for step in range(min(steps, int((start != 0).sum()))):
        image = product(basis[-1])
        images.append(image)
        rest = image
        for _ in range(2):  # twice is enough to stay orthogonal in this precision
            for vector in basis:
                rest = rest - (vector @ rest) * vector
        if (
            float(rest.norm()) <= 1e3 * torch.finfo(start.dtype).eps * float(image.norm())
            or step == steps - 1
        ):
            break
        basis.append(rest / rest.norm())
    left, right = torch.stack(basis[: len(images)]).double(), torch.stack(images).double()
    small = left @ right.T
    return float(torch.linalg.eigvalsh((small + small.T) / 2).abs().max())


def leading_direction(images: Tensor) -> Tensor:
    """Return the direction ``(P,)`` along which some vectors ``(K, P)`` reach furthest.

    Of random vectors' products with a symmetric matrix it is an estimate of the leading eigenvector (Halko,
    Martinsson & Tropp 2011).
    """
    _, vectors = torch.linalg.eigh((images @ images.T).double())
    direction: Tensor = vectors[:, -1].to(images) @ images
    return direction
