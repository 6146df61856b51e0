r"""Two-level EK-FAC: a query-independent coarse space corrects the factors against the exact curvature.

Let ``A = G + lambda I``, ``P`` the EK-FAC preconditioner, and ``Q`` an orthonormal basis of ``P^{-1} [g_1 ..
g_m]`` for ``m`` training gradients. For a right-hand side ``v`` and ``z = P^{-1} v`` the answer is

.. math:: x = z + Q T^{-1} (Q^T v - (A Q)^T z), \qquad T = Q^T A Q,

a coarse correction in the sense of deflation and domain decomposition (Frank and Vuik 2001). ``G Q`` costs
one pass over the curvature examples, once; afterwards every right-hand side and every damping costs a few
products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.factors.inverse import BlockInverse
from lightning_influence.layers.gradients import LayerGradients, concatenate
from lightning_influence.layers.layout import Layout
from lightning_influence.solvers.scoring import Correction

_PROBE_SEED = 20_240_601


@dataclass(frozen=True)
class CoarseSpace:
    """A coarse space and its products with the Gauss-Newton matrix, for any damping.

    Attributes:
        layout: the order of flat vectors.
        directions: ``Q``, ``(m, P)``, orthonormal rows.
        product: ``G Q``, ``(m, P)``.
        probe_product: ``G`` times the random probes of :func:`probes`, ``(s, P)``; it prices residuals.
        mixing: ``(m, M)``: ``Q = mixing @ P_0^{-1} anchors``.
        anchors: gradients of the ``M`` anchors by layer.
        inverse: ``P_0``.
        examples: number of curvature examples in the products.
    """

    layout: Layout
    directions: Tensor
    product: Tensor
    probe_product: Tensor
    mixing: Tensor
    anchors: Mapping[str, LayerGradients]
    inverse: BlockInverse
    examples: int

    @property
    def size(self) -> int:
        """``m``."""
        return self.directions.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        anchors = sum(layer.nbytes for layer in self.anchors.values())
        return self.directions.nbytes + self.product.nbytes + self.probe_product.nbytes + anchors


def directions(
    layout: Layout, inverse: BlockInverse, anchors: Mapping[str, LayerGradients]
) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the preconditioned anchors.

    Args:
        layout: the order of flat vectors.
        inverse: the preconditioner ``P``.
        anchors: gradients of ``M`` examples, ``K = 1``.

    Returns:
        ``Q (m, P)`` and ``mixing (m, M)`` with ``Q = mixing @ P^{-1} anchors``; ``m < M`` if the anchors are
        dependent.
    """
    vectors = inverse.apply(layout.dense(anchors)[0])
    scale = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    vectors = vectors / scale
    # Twice: the conditioning of the Gram matrix costs the first step orthogonality; the second restores it.
    first = _whitening(vectors)
    second = _whitening(first @ vectors)
    mixing = second @ first
    return mixing @ vectors, mixing / scale.T


def extended(
    space: CoarseSpace, anchors: Mapping[str, LayerGradients], product: Callable[[Tensor], Tensor]
) -> CoarseSpace:
    """A larger coarse space, with products computed for what is new only.

    Args:
        space: the space so far.
        anchors: gradients of further anchors.
        product: maps vectors ``(V, P)`` to ``G V``, over the same curvature examples as in ``space``.

    Returns:
        The space that all anchors span.
    """
    vectors = space.inverse.apply(space.layout.dense(anchors)[0])
    scale = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    vectors = vectors / scale
    # Rows of ``inside`` say what was taken out along the old directions, so that the mixing stays exact.
    inside = vectors @ space.directions.T
    vectors = vectors - inside @ space.directions
    again = vectors @ space.directions.T
    vectors, inside = vectors - again @ space.directions, inside + again
    first = _whitening(vectors)
    second = _whitening(first @ vectors)
    whitening = second @ first
    fresh = whitening @ vectors
    old = -(whitening @ inside) @ space.mixing
    top = torch.cat([space.mixing, space.mixing.new_zeros(len(space.mixing), len(vectors))], dim=1)
    bottom = torch.cat([old, whitening / scale.T], dim=1)
    joined = {name: concatenate([layer, anchors[name]]) for name, layer in space.anchors.items()}
    return replace(
        space,
        directions=torch.cat([space.directions, fresh]),
        product=torch.cat([space.product, product(fresh)]),
        mixing=torch.cat([top, bottom]),
        anchors=joined,
    )


def _whitening(vectors: Tensor) -> Tensor:
    """Return ``W`` with orthonormal ``W V``, leaving out directions that are numerically dependent."""
    gram = (vectors @ vectors.T).double()
    values, basis = torch.linalg.eigh(gram)
    floor = values.amax() * gram.shape[0] * 4 * torch.finfo(vectors.dtype).eps if len(values) else 0.0
    keep = values > floor
    whitened: Tensor = (basis[:, keep] / values[keep].sqrt()).T.to(vectors.dtype)
    return whitened


def probes(count: int, numel: int, like: Tensor) -> Tensor:
    """Return random signs ``(count, numel)``, the same at every call: ``E[(w^T r)^2] = ||r||^2``."""
    # Drawn on the CPU: a coarse space that was built on one kind of device may be used on another.
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    bits = torch.randint(0, 2, (count, numel), generator=generator, dtype=torch.int8)
    return bits.to(like.device, like.dtype).mul_(2).sub_(1)


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
