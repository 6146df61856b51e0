"""Two-level EK-FAC with a compact coarse space: the same answers, for a pass over the curvature examples.

The answer is that of :mod:`~.two_level`, ``x = z + Q T^{-1} (Q^T v - (A Q)^T z)``, with ``A Q`` never formed:
``(A Q)^T z = (B^T J Q)^T (B^T J z) / N + lambda Q^T z`` takes the rows of ``z``, one pass for all queries.
These rows tell ``z^T A z`` as well, and so the step ``t`` of the best ``x = t z + Q c`` in the norm of ``A``:
where directions are few, ``z`` overshoots outside of them, and a step below 1 mends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.curvature.compact_space import CompactSpace, CurvatureRows, compute_gram
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.low_rank_matrices import DenseMatrices, Matrices
from lightning_influence.curvature.two_level import relate_norms
from lightning_influence.linalg.enlarged_subspace import EnlargedSubspace
from lightning_influence.linalg.galerkin import GalerkinInverse
from lightning_influence.model.gradients import LayerGradients

FindRows = Callable[[Mapping[str, Matrices]], CurvatureRows]
"""Finds ``B^T J V`` of this process's curvature examples for vectors by layer."""
Combine = Callable[[CurvatureRows], Tensor]
"""Finds ``(1/N) J^T B W`` over all curvature examples for rows ``W``, ``(V, P)``."""
# Chosen by hand: examples whose rows are looked up at once.
_EXAMPLES = 64


@dataclass(frozen=True)
class CompactCorrection:
    """What :class:`~.two_level.Correction` is, of directions of low rank.

    Attributes:
        coefficients: ``(Q, m)``.
        directions: by layer.
        steps: what each preconditioned query is multiplied by, ``(Q,)``; None for 1.
    """

    coefficients: Tensor
    directions: Mapping[str, Matrices]
    steps: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """Weights of what is scored in factored form in each query's correction, ``(Q, m)``."""
        return self.coefficients

    def select(self, index: Tensor | slice) -> CompactCorrection:
        """Return the correction of some of the queries."""
        steps = None if self.steps is None else self.steps[index]
        return replace(self, coefficients=self.coefficients[index], steps=steps)

    def mix(self, name: str) -> Tensor:
        """Return the correction in one layer, ``(Q, G, D_out, D_in)``."""
        return self.directions[name].mix(self.coefficients)

    def add_to(self, solutions: Tensor) -> Tensor:
        """Add the correction to flat vectors ``(Q, P)``, in place."""
        start = 0
        for name, vectors in self.directions.items():
            solutions[:, start : start + vectors.numel] += self.mix(name).flatten(1)
            start += vectors.numel
        return solutions


class CompactTwoLevel:
    """The two-level operator for one preconditioner and a compact space.

    Args:
        inverse: ``P``, with the damping of ``A``.
        space: the coarse space.
        find_rows: runs a pass.
        combine: runs a pass.
        all_reduce_sum: sums a tensor over the processes.
    """

    def __init__(
        self,
        inverse: BlockInverse,
        space: CompactSpace,
        find_rows: FindRows,
        combine: Combine,
        all_reduce_sum: Callable[[Tensor], Tensor],
    ) -> None:
        self.inverse, self.space = inverse, space
        self._find_rows, self._combine, self._all_reduce_sum = find_rows, combine, all_reduce_sum
        probes, rows = space.num_probes, space.rows.values
        self._dtype = rows.dtype
        small = compute_gram(rows, rows[:, :, probes:]) / space.normaliser  # [W, Q]^T G Q
        for name, damping in inverse.damping.items():
            if damping:
                vectors = space.directions[name]
                small[probes:] += damping * vectors.inner(vectors)
                small[:probes] += damping * space.probes[name].inner(vectors)
        self._residual_coarse = small[:probes]  # W^T A Q, (s, m)
        self.small = (small[probes:] + small[probes:].T) / 2
        self._galerkin = GalerkinInverse(self.small, self._dtype)

    @property
    def rank(self) -> int:
        """The number of independent directions."""
        return self._galerkin.rank

    def compare(
        self, queries: Mapping[str, LayerGradients], closed: BlockInverse, tolerance: float = math.inf
    ) -> tuple[CompactCorrection, Tensor, Tensor]:
        """Find what to add to the preconditioned queries, in one pass over the curvature examples.

        Args:
            queries: query gradients, ``K = 1``.
            closed: a closed form to compare with.
            tolerance: queries with a larger residual take a step other than 1, if that makes it smaller.

        Returns:
            The correction; the estimated relative residual ``||v - A x|| / ||v||`` of each query, ``(Q,)``;
            and that of the closed form's answers in the same system, ``(Q,)``.
        """
        solved: dict[str, Matrices] = {}
        forms = [self.inverse] if _are_equal(self.inverse, closed) else [self.inverse, closed]
        products, dots = [], []
        for name, gradients in queries.items():
            dense = gradients.dense()[0]
            answers = torch.cat([form.layers[name].apply(dense) for form in forms])
            solved[name] = DenseMatrices(answers)
            parts = [part[name].dot(gradients)[0] for part in (self.space.probes, self.space.directions)]
            products.append(torch.cat(parts, dim=1))
            own, damping = answers[: len(dense)], self.inverse.layers[name].damping
            pairs = [(own, dense), (own, own * damping)]
            dots.append(torch.stack([torch.einsum("qgoi,qgoi->q", a, b) for a, b in pairs]).double())
        (image, squares), right = self._image(solved), torch.stack(products).double().sum(dim=0)
        along, damped = torch.stack(dots).sum(dim=0)  # z^T v, z^T (lambda) z
        count, probes, galerkin = len(right), self.space.num_probes, self._galerkin
        ours = image[:count]  # [W, Q]^T A z, and right: [W, Q]^T v

        def correct(steps: Tensor) -> tuple[Tensor, Tensor]:
            left = right - steps[:, None] * ours
            coefficients = galerkin.solve(left[:, probes:])
            return coefficients, left[:, :probes] - coefficients @ self._residual_coarse.T

        plain = torch.ones_like(along)
        coefficients, remainders = correct(plain)
        residuals = self._relate(remainders, queries)
        inside = galerkin.solve(ours[:, probes:])
        curved = squares[:count] + damped - (inside * ours[:, probes:]).sum(dim=1)
        best = (along - (inside * right[:, probes:]).sum(dim=1)) / curved
        best = torch.where((curved > 0) & best.isfinite(), best, plain)
        others, remainders = correct(best)
        tried = self._relate(remainders, queries)
        better = (residuals > tolerance) & (tried < residuals)
        correction = CompactCorrection(
            torch.where(better[:, None], others, coefficients).to(self._dtype),
            self.space.directions,
            torch.where(better, best, plain).to(self._dtype),
        )
        closed_residuals = self._relate((right - image[-count:])[:, :probes], queries)
        return correction, torch.where(better, tried, residuals), closed_residuals

    def _relate(self, remainders: Tensor, queries: Mapping[str, LayerGradients]) -> Tensor:
        return relate_norms(remainders.to(self._dtype), queries)

    def begin(self, vectors: Tensor) -> EnlargedSubspace:
        """Return the subspace that block Krylov begins with, for right-hand sides ``(V, P)``."""
        return EnlargedSubspace(vectors, self)

    def project(self, vectors: Tensor) -> Tensor:
        """Return ``Q^T v`` of flat vectors, ``(V, m)``."""
        blocks = self.space.layout.split(vectors)
        parts = [self.space.directions[name].project(block) for name, block in blocks.items()]
        return torch.stack(parts).sum(dim=0)

    def combine(self, weights: Tensor) -> Tensor:
        """Return ``Q w`` of weights ``(V, m)``, ``(V, P)``."""
        flat = weights.to(self._dtype).new_zeros(len(weights), self.space.layout.numel)
        return CompactCorrection(weights.to(flat), self.space.directions).add_to(flat)

    def multiply(self, weights: Tensor) -> Tensor:
        """Return ``A Q w`` of weights ``(V, m)``, ``(V, P)``, in a pass over the curvature examples."""
        rows = self.space.rows.values[:, :, self.space.num_probes :] @ weights.to(self._dtype).T
        result = self._combine(CurvatureRows(self.space.rows.indices, rows))
        damping = self.space.layout.expand(self.inverse.damping, result)
        return result.add_(self.combine(weights) * damping)

    def _image(self, solved: Mapping[str, Matrices]) -> tuple[Tensor, Tensor]:
        """Return ``[W, Q]^T A z`` of vectors by layer, ``(V, s + m)``, and ``z^T G z``, both in float64."""
        found, rows = self._find_rows(solved), self.space.rows
        columns = found.values.shape[1]  # of this process's examples: others may have more
        image = self.small.new_zeros(found.values.shape[2], rows.values.shape[2])
        for some in torch.split(torch.arange(len(found.indices)), _EXAMPLES):
            image += compute_gram(found.values[some], rows.find(found.indices[some])[:, :columns])
        squares = found.values.double().square().sum(dim=(0, 1))
        image = self._all_reduce_sum(image) / self.space.normaliser
        squares = self._all_reduce_sum(squares) / self.space.normaliser
        damped = torch.zeros_like(image)
        for name, vectors in solved.items():
            damping, space = self.inverse.layers[name].damping, self.space
            parts = [part[name].project(vectors.dense()) for part in (space.probes, space.directions)]
            damped += damping * torch.cat(parts, dim=1)
        return image + damped, squares


def rescale_compact(inverse: BlockInverse, space: CompactSpace) -> BlockInverse:
    """Multiply the preconditioner by the step that is best for a compact space's directions.

    See :func:`~.two_level.rescale_inverse`: the directions are preconditioned anchors themselves.

    Args:
        inverse: ``P^{-1}``, with any damping.
        space: the coarse space.

    Returns:
        ``alpha P^{-1}``; unchanged if the directions are all zero.
    """
    rows = space.rows.values[:, :, space.num_probes :]
    above, below = 0.0, float(rows.double().square().sum()) / space.normaliser
    for name, vectors in space.directions.items():
        for some in vectors.runs():
            formed = vectors.dense(some)
            damped = inverse.layers[name].damping * float(formed.double().square().sum())
            above += float((formed * space.inverse.layers[name].multiply(formed)).double().sum()) + damped
            below += damped
    return inverse.scaled(above / below) if above > 0 and below > 0 else inverse


def _are_equal(one: BlockInverse, other: BlockInverse) -> bool:
    """Return whether two closed forms of the same eigenvalues have the same damping and scale."""
    return one.damping == other.damping and all(
        layer.scale == other.layers[name].scale for name, layer in one.layers.items()
    )
