r"""Two-level EK-FAC: a query-independent coarse space corrects the factors against the exact curvature.

Let ``A = G + lambda I``, ``P`` the EK-FAC preconditioner, and ``Q`` an orthonormal basis of ``P^{-1} [g_1 ..
g_m]`` for ``m`` training gradients. For a right-hand side ``v`` and ``z = P^{-1} v`` the answer is

.. math:: x = z + Q T^{-1} (Q^T v - (A Q)^T z), \qquad T = Q^T A Q,

a coarse correction in the sense of deflation and domain decomposition (Frank and Vuik 2001). Where EK-FAC is
too small as a whole, ``z`` overshoots outside the coarse space, where nothing corrects it, and
:func:`rescale_inverse` takes out the common factor, at no cost. ``G Q`` costs one pass over the curvature
examples, once; afterwards every right-hand side and every damping costs a few products.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.curvature.coarse_space import CoarseSpace, draw_signs
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.linalg.block_krylov import Subspace
from lightning_influence.linalg.orthonormal import inner
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.support.long_products import multiply_long

# Chosen by hand: bytes of vectors that are formed at once where only products with them are wanted.
_FORMED_BYTES = 2**25


class TwoLevel:
    """The two-level operator for one preconditioner (and so one damping).

    Everything a query needs is linear in its gradient ``v``: the coefficients ``c = C v`` of the correction,
    and ``s`` random projections of the residual, which estimate its norm to a relative error of about ``1 /
    sqrt(2 s)``. What stands for ``C`` is as large as the coarse space: it is made layer by layer and let go,
    but for :meth:`quadratic`, which is asked again and again.

    Args:
        inverse: ``P``, with the damping of ``A``.
        space: the coarse space.
        most_bytes: of the space's vectors that are formed at once, which takes three times as much again.
    """

    def __init__(self, inverse: BlockInverse, space: CoarseSpace, most_bytes: int = _FORMED_BYTES) -> None:
        self.inverse, self.space, self._most_bytes = inverse, space, most_bytes
        self._names = list(space.layout.shapes)
        self._blocks = [space.layout.split(x) for x in (space.directions, space.product, space.probe_product)]
        self._signs = space.layout.split(draw_signs(len(space.probe_product), space.layout.numel))
        small = space.directions.new_zeros(space.size, space.size, dtype=torch.float64)
        coarse = space.directions.new_zeros(len(space.probe_product), space.size)
        for name in self._names:
            directions = self._blocks[0][name].flatten(1)
            for rows in self._runs(name, space.size):
                small[rows] += inner(self._image(name, rows).flatten(1), directions)
            for rows in self._runs(name, len(coarse)):
                coarse[rows] += multiply_long(self._probe_image(name, rows)[1].flatten(1), directions.T)
        self._small = torch.linalg.cholesky((small + small.T) / 2)
        self._residual_coarse = coarse  # W^T A Q, (s, m)

    @functools.cached_property
    def _product(self) -> Tensor:
        """``A Q``, ``(m, P)``."""
        return self.space.layout.join({name: self._image(name) for name in self._names})

    @functools.cached_property
    def _rights(self) -> dict[str, Tensor]:
        """``Q - P^{-1} A Q`` by layer."""
        return {name: self._right(name) for name in self._names}

    def _runs(self, name: str, count: int) -> Iterator[slice]:
        """Yield which of a layer's vectors to form at once."""
        each = self._blocks[0][name].element_size() * self.space.layout.numels[name]
        step = max(1, self._most_bytes // each)
        return (slice(start, min(start + step, count)) for start in range(0, max(1, count), step))

    def _image(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Return ``A Q`` in one layer, ``(m, G, D_out, D_in)``."""
        return self._blocks[1][name][rows] + self.inverse.layers[name].damping * self._blocks[0][name][rows]

    def _right(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Return ``Q - P^{-1} A Q`` in one layer."""
        return self._blocks[0][name][rows] - self.inverse.layers[name].apply(self._image(name, rows))

    def _probe_image(self, name: str, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the probes ``W`` and ``A W`` in one layer, ``(s, G, D_out, D_in)``."""
        product = self._blocks[2][name][rows]
        signs = self._signs[name][rows].to(product.device, product.dtype)
        return signs, product + self.inverse.layers[name].damping * signs

    def _project(self, inverse: BlockInverse, name: str, gradients: LayerGradients) -> Tensor:
        """Return products of a layer's gradients with ``W - P'^{-1} A W``, ``(Q, s)``."""
        parts = []
        for rows in self._runs(name, len(self._signs[name])):
            signs, image = self._probe_image(name, rows)
            parts.append(gradients.dot(signs - inverse.layers[name].apply(image))[0])
        return torch.cat(parts, dim=1)

    def correction(self, queries: Mapping[str, LayerGradients]) -> tuple[Correction, Tensor]:
        """What to add to the preconditioned queries, and how far from solved they are then.

        Args:
            queries: query gradients, ``K = 1``.

        Returns:
            The correction, and the estimated relative residual ``||v - A x|| / ||v||`` of each query,
            ``(Q,)``.
        """
        space = self.space
        names = [name for name in self._names if name in queries]
        products = [
            torch.cat(
                [queries[name].dot(self._right(name, rows))[0] for rows in self._runs(name, space.size)],
                dim=1,
            )
            for name in names
        ]
        coefficients = self._coordinates(torch.stack(products).sum(dim=0))
        projected = sum(self._project(self.inverse, name, queries[name]) for name in names)
        projected = projected - coefficients @ self._residual_coarse.T
        residuals = relate_norms(projected, queries)
        correction = Correction(coefficients, space.directions, space.mixing, space.anchors, space.inverse)
        return correction, residuals

    def begin(self, vectors: Tensor) -> Subspace:
        """Return the subspace that block Krylov begins with, for right-hand sides ``(V, P)``."""
        damping = self.space.layout.expand(self.inverse.damping, vectors)
        directions = self.space.directions
        return Subspace(vectors, (directions, self.space.product + damping * directions))

    def estimate_residuals(self, inverse: BlockInverse, queries: Mapping[str, LayerGradients]) -> Tensor:
        """Estimate how far from solved the answers of a closed form are, in the system that this one solves.

        Args:
            inverse: the closed form ``P'^{-1}``, with any damping.
            queries: query gradients, ``K = 1``.

        Returns:
            The relative residuals ``||v - A P'^{-1} v|| / ||v||``, ``(Q,)``, from the random projections that
            :meth:`correction` uses as well.
        """
        products = [self._project(inverse, name, queries[name]) for name in self._names if name in queries]
        return relate_norms(torch.stack(products).sum(dim=0), queries)

    def solve(self, vectors: Tensor) -> Tensor:
        """Return ``x`` for flat right-hand sides ``(V, P)``."""
        blocks = self.space.layout.split(vectors)
        parts = [
            multiply_long(blocks[name].flatten(1), self._right(name).flatten(1).T) for name in self._names
        ]
        result = self.inverse.apply(vectors)
        return result.addmm_(self._coordinates(torch.stack(parts).sum(dim=0)), self.space.directions)

    def precondition(self, vectors: Tensor) -> Tensor:
        """Apply the coarse correction before and after ``P^{-1}``: symmetric positive definite.

        The balancing preconditioner (Mandel 1993; Tang et al. 2009): with ``E = Q T^{-1} Q^T``, ``(I - E A)
        P^{-1} (I - A E) + E``. :meth:`solve` corrects after ``P^{-1}`` only, which costs less but is not
        symmetric, as conjugate gradients and MINRES need it.

        Args:
            vectors: ``(V, P)``.

        Returns:
            ``(V, P)``.
        """
        first = self._coordinates(multiply_long(vectors, self.space.directions.T))
        smoothed = self.inverse.apply(vectors - first @ self._product)
        second = self._coordinates(multiply_long(smoothed, self._product.T))
        return smoothed + (first - second) @ self.space.directions

    def quadratic(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return ``g^T x(g)`` of each gradient, ``(K, B)``."""
        size = self.space.size
        parts = [
            gradients[name].dot(torch.cat([self._blocks[0][name], self._rights[name]]))
            for name in self._names
            if name in gradients
        ]
        products = torch.stack(parts).sum(dim=0)
        corrected = (products[..., :size] * self._coordinates(products[..., size:])).sum(dim=-1)
        return self.inverse.quadratic(gradients) + corrected

    def _coordinates(self, products: Tensor) -> Tensor:
        """Return ``T^{-1} y`` for rows ``y``, solved in float64."""
        flat = products.reshape(products.shape[:-1].numel(), products.shape[-1]).double().T
        return torch.cholesky_solve(flat, self._small).T.to(products.dtype).view(products.shape)


def rescale_inverse(inverse: BlockInverse, space: CoarseSpace) -> BlockInverse:
    r"""Multiply the preconditioner by the step that is best for the anchors of a coarse space.

    For the preconditioned anchors ``z_a``, whose products with ``G`` are known, the step

    .. math:: \alpha = \sum_a z_a^T P z_a \; / \; \sum_a z_a^T A z_a

    minimises the sum of ``||alpha z_a - A^{-1} P z_a||^2`` in the norm of ``A``. It is 1 if ``P = A``. Cross
    terms between layers, which EK-FAC leaves out, make it small: 0.3 on a character transformer, where the
    rank correlation of two-level scores with exact ones rises from .54 to .69
    (``examples/benchmarks/sketches.py``).

    Args:
        inverse: ``P^{-1}``, with any damping.
        space: the coarse space.

    Returns:
        ``alpha P^{-1}``; unchanged if the anchors are all zero.
    """
    layout, first = space.layout, space.inverse
    shift = layout.expand(inverse.damping, space.directions)  # P_0 less its damping, and the new one
    small = inner(space.directions, space.product).to(space.mixing.dtype)
    # Anchors are not all kept: what they became lies in the span, z = mixing^{-1} Q.
    mixtures = torch.linalg.pinv(space.mixing.double()).to(space.mixing.dtype)
    above = below = 0.0
    rows = max(1, _FORMED_BYTES // (space.directions.element_size() * layout.numel))
    for coordinates in torch.split(mixtures, rows):
        answers = coordinates @ space.directions
        damped = float((answers.square() @ shift).sum())
        above += float((answers * first.multiply(answers)).sum()) + damped
        below += float((coordinates @ small * coordinates).sum()) + damped
    return inverse.scaled(above / below) if above > 0 and below > 0 else inverse


def relate_norms(projected: Tensor, queries: Mapping[str, LayerGradients]) -> Tensor:
    """Return norms of residuals over those of the queries, from projections on random probes ``(Q, s)``."""
    norms = square_norms(queries).sqrt()
    return projected.square().mean(dim=1).sqrt() / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def square_norms(gradients: Mapping[str, LayerGradients]) -> Tensor:
    """Return ``||g||^2`` of each gradient over all layers, ``(B,)``, for ``K = 1``."""
    total: Tensor | None = None
    for layer in gradients.values():
        part = layer.squared_norms()[0]
        total = part if total is None else total + part
    assert total is not None
    return total


@dataclass(frozen=True)
class Correction:
    """A query-independent set of directions added to the preconditioned queries.

    ``x_q = P^{-1} v_q + sum_i coefficients_qi directions_i``, where the directions are themselves mixtures of
    preconditioned anchor gradients, ``directions = mixing @ (P_0^{-1} anchors)``, so that they can be scored
    in factored form as well.

    Attributes:
        coefficients: ``(Q, m)``.
        directions: ``(m, P)``.
        mixing: ``(m, M)``.
        anchors: gradients of the ``M`` anchors by layer.
        inverse: ``P_0``, the preconditioner the directions were made with.
    """

    coefficients: Tensor
    directions: Tensor
    mixing: Tensor
    anchors: Mapping[str, LayerGradients]
    inverse: BlockInverse

    @property
    def weights(self) -> Tensor:
        """Weights of the anchors in each query's correction, ``(Q, M)``."""
        return self.coefficients @ self.mixing

    def select(self, index: Tensor | slice) -> Correction:
        """Return the correction of some of the queries."""
        return replace(self, coefficients=self.coefficients[index])

    def mix(self, name: str) -> Tensor:
        """Return the correction in one layer, ``(Q, G, D_out, D_in)``."""
        part = self.inverse.layout.split(self.directions)[name]
        return (self.coefficients @ part.flatten(1)).view(-1, *part.shape[1:])

    def add_to(self, solutions: Tensor) -> Tensor:
        """Add the correction to flat vectors ``(Q, P)``, in place."""
        return solutions.addmm_(self.coefficients, self.directions)
