r"""Least squares over a subset of the coordinates: ``argmin_x ||H[:, S] x - g||^2 + r ||x||^2``.

The minimum solves :math:`((H^2)_{SS} + r I) x = (H g)_S`, which is positive semidefinite whatever the signs
of the eigenvalues of ``H``. Generalized influence functions (Lyu, Jang, Ryu, Yang 2023) are this problem.

Their own iteration is a modified LiSSA: with :math:`H' = H/\nu` and :math:`g' = g/\nu`,

.. math:: I_0 = P_S H' g', \qquad I \leftarrow I_0 + I - P_S H' H' I,

whose fixed point is the least-squares solution whatever :math:`\nu`. It converges if and only if
:math:`\nu^2 > \lambda_{max}((H^2)_{SS}) / 2`. They find a scale by restarting when the iteration diverges;
here it is computed beforehand.

Shapes: vectors are flat, ``(P,)``, and zero outside ``S``; matrices are functions of ``(V, P)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.linalg.conjugate_gradients import ConjugateDirections
from lightning_influence.linalg.estimates import Product
from lightning_influence.linalg.lanczos import estimate_largest_eigenvalue
from lightning_influence.support.errors import InfluenceError

# nu^2 as a share of the largest eigenvalue. Chosen by hand: 1/2 is the edge of divergence, at 1 no direction
# overshoots and small eigenvalues take twice as long; Lanczos estimates from below, which the distance to 1/2
# allows for.
_SHARE = 0.65
# Products with the normal equations for that estimate. Chosen by hand: an estimate below 77% of the
# eigenvalue would make the iteration diverge, which it then says.
_SCALE_STEPS = 15


@dataclass(frozen=True)
class SubsetSolution:
    """The vector of one system and how good it is.

    Attributes:
        vector: ``(P,)``.
        residual: ``||b - A x|| / ||b||`` of the system that was solved. Iterations tell that of their
            recursion: at tolerances far above rounding, a product more to verify it is not worth its pass.
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


def make_normal_product(product: Product, mask: Tensor, ridge: float) -> Product:
    """Make the function ``V -> ((H^2)_SS + r I) V`` on vectors that are zero outside ``S``.

    Args:
        product: ``H`` on ``(V, P)``, symmetric.
        mask: ``S``, boolean, ``(P,)``.
        ridge: ``r``.

    Returns:
        The function.
    """

    def apply(vectors: Tensor) -> Tensor:
        return product(product(vectors)) * mask.to(vectors) + ridge * vectors

    return apply


def solve_positive(
    product: Product,
    right: Tensor,
    *,
    inverse_diagonal: Tensor | None = None,
    tolerance: float = 1e-2,
    max_steps: int = 40,
) -> SubsetSolution:
    """Solve ``A x = b`` by preconditioned conjugate gradients, until they meet no positive curvature.

    Args:
        product: ``A``, symmetric and positive semidefinite.
        right: ``b``, ``(P,)``; where it and the preconditioner are zero the solution stays zero.
        inverse_diagonal: the preconditioner, ``(P,)``; positive inside ``S``.
        tolerance: relative residual to stop at.
        max_steps: most products.

    Returns:
        The solution; the one of least norm in the preconditioner's metric if there are several.
    """
    norm, solution = float(right.norm()), torch.zeros_like(right)
    if norm == 0:
        return SubsetSolution(solution, 0.0, 0)
    precondition = None if inverse_diagonal is None else lambda vectors: vectors * inverse_diagonal
    recursion = ConjugateDirections(right[None], precondition)
    best, best_residual, steps = solution, 1.0, 0
    while steps < max_steps and best_residual > tolerance:
        change, curvature = recursion.advance(product)
        steps += 1
        if not float(curvature) > 0:
            return SubsetSolution(
                best, best_residual, steps, definite=float(curvature) == 0, unresolved=float(curvature) == 0
            )
        solution = solution + change[0]
        residual = float(recursion.remainder.norm()) / norm
        # The residual of conjugate gradients is not monotone: the best iterate is returned.
        if residual < best_residual:
            best, best_residual = solution, residual
        recursion.turn(torch.ones_like(curvature, dtype=torch.bool))
    return SubsetSolution(best, best_residual, steps)


def solve_by_lissa(
    product: Product, right: Tensor, nu2: float, *, tolerance: float = 1e-2, max_steps: int = 400
) -> SubsetSolution:
    """Iterate the modified LiSSA to the solution of ``((H^2)_SS + r I) x = (H g)_S``.

    Args:
        product: ``(H^2)_SS + r I``.
        right: ``(H g)_S``, ``(P,)``.
        nu2: ``nu^2``.
        tolerance: relative residual of the normal equations to stop at.
        max_steps: most iterations, each of two products with ``H``.

    Returns:
        The solution.

    Raises:
        InfluenceError: if it diverges, which a scale from :func:`derive_squared_scale` does not.
    """
    norm = float(right.norm())
    solution = right / nu2
    if norm == 0:
        return SubsetSolution(solution, 0.0, 0)
    residual, steps, growth = 1.0, 0, 1e3
    while steps < max_steps:
        remainder = right - product(solution[None])[0]
        residual = float(remainder.norm()) / norm
        steps += 1
        if residual <= tolerance:
            break
        if not residual < growth:
            raise InfluenceError(
                f"The modified LiSSA diverged after {steps} steps, nu^2 = {nu2:.3g}: the largest "
                "eigenvalue of (H^2)_SS is above twice that. Leave the scale alone, or use solver='cg'."
            )
        solution = solution + remainder / nu2
    return SubsetSolution(solution, residual, steps)


def derive_squared_scale(product: Product, start: Tensor) -> float:
    """Derive ``nu^2`` for a normal-equation matrix from its largest eigenvalue.

    Args:
        product: ``(H^2)_SS + r I``, as :func:`make_normal_product` makes it.
        start: a random vector, zero outside ``S``.

    Returns:
        ``nu^2``.
    """
    return _SHARE * estimate_largest_eigenvalue(product, start, steps=_SCALE_STEPS)


def draw_start(mask: Tensor, like: Tensor, seed: int) -> Tensor:
    """Return a random vector ``(P,)`` that is zero outside the mask, on the CPU."""
    noise = torch.randn(len(mask), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.to(like) * mask.to(like)


def solve_densely(
    product: Product,
    target: Tensor,
    mask: Tensor,
    ridge: float = 0.0,
    *,
    limit: int = 4096,
) -> SubsetSolution:
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
    return SubsetSolution(full, float(remainder.norm()) / norm if norm else 0.0, len(chosen))


def _columns(product: Product, chosen: Tensor, like: Tensor, block: int = 64) -> Tensor:
    """Return the columns of ``H`` at ``chosen``, as rows ``(S, P)``."""
    parts = []
    for part in torch.split(chosen, block):
        units = like.new_zeros(len(part), len(like))
        units[torch.arange(len(part), device=like.device), part] = 1.0
        parts.append(product(units))
    return torch.cat(parts)


def find_leading_direction(images: Tensor) -> Tensor:
    """Return the direction ``(P,)`` along which some vectors ``(K, P)`` reach furthest.

    Of random vectors' products with a symmetric matrix it is an estimate of the leading eigenvector (Halko,
    Martinsson & Tropp 2011).
    """
    _, vectors = torch.linalg.eigh((images @ images.T).double())
    direction: Tensor = vectors[:, -1].to(images) @ images
    return direction
