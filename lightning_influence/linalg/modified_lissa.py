r"""The modified LiSSA of generalized influence functions, with its scale from the spectrum.

With :math:`H' = H/\nu` and :math:`g' = g/\nu`, Lyu, Jang, Ryu and Yang (2023) iterate

.. math:: I_0 = P_S H' g', \qquad I \leftarrow I_0 + I - P_S H' H' I,

whose fixed point is the least-squares solution whatever :math:`\nu`. It converges if and only if
:math:`\nu^2 > \lambda_{max}((H^2)_{SS}) / 2`. They find a scale by restarting when the iteration diverges;
here it is computed beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.linalg.normal_equations import Solve, Vector, largest_eigenvalue
from lightning_influence.support.errors import InfluenceError

# nu^2 as a share of the largest eigenvalue: 1/2 is the edge of divergence, at 1 no direction overshoots and
# small eigenvalues take twice as long. Lanczos estimates from below, which the distance to 1/2 allows for.
SHARE = 0.65


def squared_scale(product: Vector, start: Tensor) -> float:
    """Return ``nu^2`` for a normal-equation matrix, from its largest eigenvalue.

    Args:
        product: ``(H^2)_SS + r I``, as :func:`..normal_equations.normal_product` makes it.
        start: a random vector, zero outside ``S``.

    Returns:
        ``nu^2``.
    """
    return SHARE * largest_eigenvalue(product, start, steps=15)


def modified_lissa(
    product: Vector, right: Tensor, nu2: float, *, tolerance: float = 1e-2, max_steps: int = 400
) -> Solve:
    """Iterate to the solution of ``((H^2)_SS + r I) x = (H g)_S``.

    Args:
        product: ``(H^2)_SS + r I``.
        right: ``(H g)_S``, ``(P,)``.
        nu2: ``nu^2``.
        tolerance: relative residual of the normal equations to stop at.
        max_steps: most iterations, each of two products with ``H``.

    Returns:
        The solution.

    Raises:
        InfluenceError: if it diverges, which a scale from :func:`squared_scale` does not.
    """
    norm = float(right.norm())
    solution = right / nu2
    if norm == 0:
        return Solve(solution, 0.0, 0)
    residual, steps, growth = 1.0, 0, 1e3
    while steps < max_steps:
        remainder = right - product(solution)
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
    return Solve(solution, residual, steps)


def random_start(mask: Tensor, like: Tensor, seed: int) -> Tensor:
    """Return a random vector ``(P,)`` that is zero outside the mask, drawn on the CPU."""
    noise = torch.randn(len(mask), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.to(like) * mask.to(like)
