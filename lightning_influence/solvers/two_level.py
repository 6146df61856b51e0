r"""Two-level EK-FAC: a query-independent coarse space corrects the factors against the exact curvature.

Let ``A = G + lambda I``, ``P`` the EK-FAC preconditioner, and ``Q`` an orthonormal basis of ``P^{-1} [g_1 ..
g_m]`` for ``m`` training gradients. For a right-hand side ``v`` and ``z = P^{-1} v`` the answer is

.. math:: x = z + Q T^{-1} (Q^T v - (A Q)^T z), \qquad T = Q^T A Q,

a coarse correction in the sense of deflation and domain decomposition (Frank and Vuik 2001). ``G Q`` costs
one pass over the curvature examples, once; afterwards every right-hand side and every damping costs a few
products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.factors.inverse import BlockInverse
from lightning_influence.layers.gradients import LayerGradients
from lightning_influence.solvers.coarse_space import CoarseSpace, probes
from lightning_influence.solvers.scoring import Correction


class TwoLevel:
    """The two-level operator for one preconditioner (and so one damping).

    Everything a query needs is linear in its gradient ``v``: the coefficients ``c = C v`` of the correction,
    and ``s`` random projections of the residual, which estimate its norm to a relative error of about ``1 /
    sqrt(2 s)``.

    Args:
        inverse: ``P``, with the damping of ``A``.
        space: the coarse space.
    """

    def __init__(self, inverse: BlockInverse, space: CoarseSpace) -> None:
        self.inverse, self.space = inverse, space
        damping = space.layout.expand(inverse.damping, space.directions)
        product = space.product + damping * space.directions  # A Q
        small = (space.directions.double() @ product.double().T).to(torch.float64)
        self._small = (small + small.T) / 2
        right = space.directions - inverse.apply(product)
        self._coefficients = torch.linalg.solve(self._small, right.double()).to(right.dtype)  # (m, P)
        signs = probes(space.probe_product.shape[0], space.layout.numel, product)
        probe_product = space.probe_product + damping * signs  # A W
        self._residual = signs - inverse.apply(probe_product)  # W - P^{-1} A W
        self._residual_coarse = probe_product @ space.directions.T  # (s, m)

    def correction(self, queries: Mapping[str, LayerGradients]) -> tuple[Correction, Tensor]:
        """What to add to the preconditioned queries, and how far from solved they are then.

        Args:
            queries: query gradients, ``K = 1``.

        Returns:
            The correction, and the estimated relative residual ``||v - A x|| / ||v||`` of each query,
            ``(Q,)``.
        """
        space = self.space
        stacked = torch.cat([self._coefficients, self._residual])
        products = space.layout.dot(queries, stacked)[0]
        coefficients, projected = products[:, : space.size], products[:, space.size :]
        projected = projected - coefficients @ self._residual_coarse.T
        norms = squared_norms(queries).sqrt()
        residual = projected.square().mean(dim=1).sqrt() / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        correction = Correction(coefficients, space.directions, space.mixing, space.anchors, space.inverse)
        return correction, residual

    def solve(self, vectors: Tensor) -> Tensor:
        """Return ``x`` for flat right-hand sides ``(V, P)``."""
        coarse: Tensor = (vectors @ self._coefficients.T) @ self.space.directions
        return self.inverse.apply(vectors) + coarse

    def quadratic(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return ``g^T x(g)`` of each gradient, ``(K, B)``."""
        space = self.space
        left = space.layout.dot(gradients, space.directions)
        right = space.layout.dot(gradients, self._coefficients)
        return self.inverse.quadratic(gradients) + (left * right).sum(dim=-1)


def squared_norms(gradients: Mapping[str, LayerGradients]) -> Tensor:
    """Return ``||g||^2`` of each gradient over all layers, ``(B,)``, for ``K = 1``."""
    total: Tensor | None = None
    for layer in gradients.values():
        like = layer.select(slice(0, 1)).dense()
        part = layer.weighted_squares(torch.ones_like(like[0, 0]))[0]
        total = part if total is None else total + part
    assert total is not None
    return total
