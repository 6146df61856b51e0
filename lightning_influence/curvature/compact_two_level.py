"""Two-level EK-FAC with a compact coarse space: the same answers, for a pass over the curvature examples.

The answer is that of :mod:`~.two_level`, ``x = z + Q T^{-1} (Q^T v - (A Q)^T z)``, with ``A Q`` never formed:
``(A Q)^T z = (B^T J Q)^T (B^T J z) / N + lambda Q^T z`` takes the rows of ``z``, one pass for all queries.
These rows tell ``z^T A z`` as well, and so the step ``t`` of the best ``x = t z + Q c`` in the norm of ``A``:
where directions are few, ``z`` overshoots outside of them, and a step below 1 mends it. And they tell as much
of the answer of a second closed form, which may be the better ``z``, with directions or without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.curvature.compact_solving import solve_within
from lightning_influence.curvature.compact_space import CompactSpace, CurvatureRows, compute_gram
from lightning_influence.curvature.compact_ways import Form, System, Way, choose, measure_gains
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.low_rank_matrices import Matrices, join_matrices
from lightning_influence.curvature.two_level import relate_norms, square_norms
from lightning_influence.linalg.enlarged_subspace import EnlargedSubspace
from lightning_influence.linalg.galerkin import GalerkinInverse
from lightning_influence.model.layers.gradients import LayerGradients

FindRows = Callable[[Mapping[str, Matrices]], CurvatureRows]
"""Finds ``B^T J V`` of this process's curvature examples for vectors by layer."""
Combine = Callable[[CurvatureRows], Tensor]
"""Finds ``(1/N) J^T B W`` over all curvature examples for rows ``W``, ``(V, P)``."""
# Chosen by hand: examples whose rows are looked up at once.
_EXAMPLES = 64
_ALL, _HALVES = slice(None), (slice(0, None, 2), slice(1, None, 2))


@dataclass(frozen=True)
class CompactCorrection:
    """Corrected answers: ``x = t z + Q c`` with ``z`` and the directions in low rank.

    Attributes:
        coefficients: ``c`` of the parts of the directions in all stages, ``(Q, m S)``.
        space: holds the directions.
        solved: ``z`` by layer, as far as it is not cut.
        steps: ``t``, ``(Q,)``.
        shortened: how many of the answers have another length than is best in the norm of ``A``.
        alone: how many are the second closed form's, in another length.
    """

    coefficients: Tensor
    space: CompactSpace
    solved: Mapping[str, Matrices]
    steps: Tensor
    shortened: int = 0
    alone: int = 0

    def select(self, index: Tensor | slice) -> CompactCorrection:
        """Return the answers to some of the queries."""
        solved = {name: vectors.select(index) for name, vectors in self.solved.items()}
        return replace(self, coefficients=self.coefficients[index], solved=solved, steps=self.steps[index])

    def in_layer(self, name: str) -> Tensor:
        """Return the directions' coefficients in a layer, ``(Q, m)``."""
        return self.coefficients[:, self.space.columns(name)]

    def form(self, name: str) -> Tensor:
        """Return the answers in one layer, ``(Q, G, D_out, D_in)``."""
        mixed = self.space.directions[name].mix(self.in_layer(name))
        if name in self.solved:
            mixed += self.solved[name].scaled(self.steps).dense()
        return mixed

    def solutions(self) -> Tensor:
        """Return the answers as flat vectors, ``(Q, P)``."""
        layout = self.space.layout
        return layout.join({name: self.form(name) for name in layout.shapes})


@dataclass(frozen=True)
class ClosedAnswers:
    """Answers of closed forms, which take no coarse space and may be found before there is one.

    Attributes:
        vectors: ``z`` by layer, of all queries for the first form, then for the second if there is one.
        along: ``z^T v``, ``(forms, Q)`` in float64.
        damped: ``z^T lambda z`` with the damping of the first form, ``(forms, Q)`` in float64.
    """

    vectors: Mapping[str, Matrices]
    along: Tensor
    damped: Tensor

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(part.nbytes for part in self.vectors.values())


class CompactTwoLevel:
    """The two-level operator for one preconditioner and a compact space.

    Args:
        inverse: ``P`` but for its step, with the damping of ``A``.
        space: the coarse space.
        find_rows: runs a pass.
        combine: runs a pass.
        all_reduce_sum: sums a tensor over the processes.
        step: factor of ``P^{-1}``, from :func:`compute_best_step`.
    """

    def __init__(
        self,
        inverse: BlockInverse,
        space: CompactSpace,
        find_rows: FindRows,
        combine: Combine,
        all_reduce_sum: Callable[[Tensor], Tensor],
        step: float = 1.0,
    ) -> None:
        self.inverse, self.space, self.step = inverse, space, step
        self._find_rows, self._combine, self._all_reduce_sum = find_rows, combine, all_reduce_sum
        self._dtype = space.rows.values.dtype
        self._residual_coarse, self.small = self._multiply_out(_ALL)  # W^T A Q, (s, m S), and Q^T A Q
        self._galerkin = GalerkinInverse(self.small, self._dtype)

    @property
    def rank(self) -> int:
        """The number of independent directions."""
        return self._galerkin.rank

    def compare(
        self,
        queries: Mapping[str, LayerGradients],
        answers: ClosedAnswers,
        rows: CurvatureRows | None = None,
        tolerance: float = 0.0,
    ) -> tuple[CompactCorrection, Tensor, Tensor]:
        """Find the corrected answers.

        Args:
            queries: query gradients, ``K = 1``.
            answers: those of closed forms: ``P``, and another one that answers are compared with and whose
                ``z`` may take the place of that of ``P``; it is ``P`` with a step of 1 if there is one form.
                Residuals are those of answers as they are held.
            rows: ``B^T J z`` of this process's curvature examples; None to find them in a pass.
            tolerance: every query gets the best of ``z + Q c``, of the best steps ``t z + Q c`` with the
                ``z`` of either form, and of ``t z`` of the other form alone; up to this residual the first.
                Where that is above 1 still, answers are shortened, so that they are better than none. Of
                random mixtures, the best are those with the ``z`` of the other form, and of these what gains
                most on mixtures that it was not made of, among what is better than none.

        Returns:
            The answers; the estimated relative residual ``||v - A x|| / ||v||`` of each query, ``(Q,)``; and
            that of the other closed form's answers in the same system, ``(Q,)``.
        """
        space, probes = self.space, self.space.num_probes
        right = self.small.new_zeros(answers.along.shape[1], probes + len(self.small))  # [W, Q]^T v
        for name, gradients in queries.items():
            right[:, :probes] += space.probes[name].dot(gradients)[0]
            right[:, probes:][:, space.columns(name)] += space.directions[name].dot(gradients)[0]
        rows = self._find_rows(answers.vectors) if rows is None else rows
        system, gains = System(self.small, self._place(answers, rows)), None
        forms, ways = system.forms, system.list_ways(right, self._galerkin)
        seen = right[:, :probes]
        if len(forms) > 1:
            own = forms[1].image[:, :probes]
            steps = (own * seen).sum(dim=1) / own.square().sum(dim=1)
            steps = torch.where(steps.isfinite(), steps, torch.ones_like(steps))
            ways.append(Way(1, steps, torch.zeros_like(ways[0].coefficients)))
        if space.mixtures > 1:
            halves = [self._halve(answers, rows, half) for half in _HALVES]
            gains = measure_gains(halves, right, self._dtype)[: len(ways)]
            del halves
        remainders = torch.stack([way.leave(forms, seen, self._residual_coarse) for way in ways])
        scale = square_norms(queries).double().clamp_min(torch.finfo(torch.float64).tiny)
        chosen = choose(remainders, seen, scale, tolerance, gains)
        taken, each = chosen.best, torch.arange(len(scale), device=scale.device)
        coefficients = torch.stack([way.coefficients for way in ways])[taken, each]
        steps = torch.stack([way.steps * forms[way.form].factor for way in ways])[taken, each]
        bases = torch.tensor([forms[way.form].first for way in ways], device=taken.device)[taken]
        correction = CompactCorrection(
            (coefficients * chosen.lengths[:, None]).to(self._dtype),
            space,
            {name: vectors.select(bases + each) for name, vectors in answers.vectors.items()},
            (steps * chosen.lengths).to(self._dtype),
            int((chosen.lengths != 1).sum()),
            int((taken > len(forms)).sum()),
        )
        # What is best by some probes looks better to them than it is: the others tell how good it is.
        told = torch.zeros_like(scale)
        for half, rest in (_HALVES, _HALVES[::-1]):
            choice = choose(remainders[..., half], seen[:, half], scale, tolerance, gains)
            told += choice.leave(remainders[..., rest], seen[:, rest]).square().sum(dim=1)
        residuals = (told / probes / scale).sqrt().to(self._dtype)
        closed_residuals = self._relate(seen - forms[-1].image[:, :probes], queries)
        return correction, residuals, closed_residuals

    def _multiply_out(self, half: slice) -> tuple[Tensor, Tensor]:
        """Return ``W^T A Q`` and ``Q^T A Q`` in float64, estimated from some of the columns."""
        space, probes = self.space, self.space.num_probes
        rows = space.rows.values[:, half]
        small = compute_gram(rows, rows[:, :, probes:]) * self._rescale(half)  # [W, Q]^T G Q
        for name, damping in self.inverse.damping.items():
            if damping:
                vectors, columns = space.directions[name], space.columns(name)
                small[probes:][columns, columns] += damping * vectors.inner(vectors)
                small[:probes, columns] += damping * space.probes[name].inner(vectors)
        return small[:probes], (small[probes:] + small[probes:].T) / 2

    def _rescale(self, half: slice) -> float:
        """Return what sums over some of the columns are multiplied by."""
        columns = self.space.rows.values.shape[1]
        return columns / max(1, len(range(columns)[half])) / self.space.normaliser

    def _halve(self, answers: ClosedAnswers, rows: CurvatureRows, half: slice) -> System:
        """Return the system that half of the mixtures make."""
        return System(self._multiply_out(half)[1], self._place(answers, rows, half))

    def _place(self, answers: ClosedAnswers, rows: CurvatureRows, half: slice = _ALL) -> list[Form]:
        """Return what the curvature, with its damping, makes of the closed forms' answers."""
        found, count = answers.along.shape
        image = self.small.new_zeros(found * count, self.space.num_probes + len(self.small))
        curved = self._add_image(image, answers.vectors, rows, half).view(found, count) + answers.damped
        images = image.view(found, count, -1)
        kinds = [(0, self.step), (found - 1, 1.0)]
        return [
            Form(
                one * count,
                factor,
                factor * images[one],
                factor * answers.along[one],
                factor**2 * curved[one],
            )
            for one, factor in dict.fromkeys(kinds)
        ]

    def _relate(self, remainders: Tensor, queries: Mapping[str, LayerGradients]) -> Tensor:
        return relate_norms(remainders.to(self._dtype), queries)

    def begin(self, vectors: Tensor) -> EnlargedSubspace:
        """Return the subspace that block Krylov begins with, for right-hand sides ``(V, P)``."""
        return EnlargedSubspace(vectors, self)

    def project(self, vectors: Tensor) -> Tensor:
        """Return ``Q^T v`` of flat vectors, ``(V, m S)``."""
        result = vectors.new_zeros(len(vectors), len(self.small))
        for name, block in self.space.layout.split(vectors).items():
            result[:, self.space.columns(name)] += self.space.directions[name].project(block)
        return result

    def combine(self, weights: Tensor) -> Tensor:
        """Return ``Q w`` of weights ``(V, m S)``, ``(V, P)``."""
        space, weights = self.space, weights.to(self._dtype)
        return space.layout.join({
            name: vectors.mix(weights[:, space.columns(name)]) for name, vectors in space.directions.items()
        })

    def multiply(self, weights: Tensor) -> Tensor:
        """Return ``A Q w`` of weights ``(V, m S)``, ``(V, P)``, in a pass over the curvature examples."""
        rows = self.space.rows.values[:, :, self.space.num_probes :] @ weights.to(self._dtype).T
        result = self._combine(CurvatureRows(self.space.rows.indices, rows))
        damping = self.space.layout.expand(self.inverse.damping, result)
        return result.add_(self.combine(weights) * damping)

    def _add_image(
        self, image: Tensor, solved: Mapping[str, Matrices], found: CurvatureRows, half: slice
    ) -> Tensor:
        """Add ``[W, Q]^T A z`` of vectors by layer to ``(V, s + m S)`` and return ``z^T G z``; in float64."""
        space, scale = self.space, self._rescale(half)
        columns = found.values.shape[1]  # of this process's examples: others may have more
        for some in torch.split(torch.arange(len(found.indices)), _EXAMPLES):
            rows = space.rows.find(found.indices[some])[:, :columns]
            image += compute_gram(found.values[some][:, half], rows[:, half]) * scale
        squares = found.values[:, half].double().square().sum(dim=(0, 1)) * scale
        image.copy_(self._all_reduce_sum(image))
        for name, vectors in solved.items():
            damping, probes = self.inverse.layers[name].damping, space.num_probes
            image[:, :probes] += damping * vectors.inner(space.probes[name])
            image[:, probes:][:, space.columns(name)] += damping * vectors.inner(space.directions[name])
        return self._all_reduce_sum(squares)


def solve_closed(
    forms: Sequence[BlockInverse], queries: Mapping[str, LayerGradients], low_rank: float, dtype: torch.dtype
) -> ClosedAnswers:
    """Answer queries by closed forms.

    Args:
        forms: one, or two; see :func:`list_forms`.
        queries: query gradients, ``K = 1``.
        low_rank: largest relative error of answers that are held in low rank; 0 for whole matrices.
        dtype: precision of the answers.

    Returns:
        The answers, with their products with the queries.
    """
    first = next(iter(queries.values()))
    like = torch.zeros(len(forms), first.num_examples, dtype=torch.float64, device=first.like.device)
    along, damped = like, like.clone()
    vectors: dict[str, Matrices] = {}
    for name, gradients in queries.items():
        answers = [solve_within(form.layers[name], gradients, low_rank, dtype) for form in forms]
        vectors[name] = join_matrices(answers)
        for form, answer in enumerate(answers):
            dots, squares = _relate_pairs(answer, gradients)
            along[form] += dots
            damped[form] += forms[0].layers[name].damping * squares
    return ClosedAnswers(vectors, along, damped)


def list_forms(inverse: BlockInverse, closed: BlockInverse) -> list[BlockInverse]:
    """Return the closed forms whose answers differ: one where the damping is the same."""
    return [inverse] if inverse.damping == closed.damping else [inverse, closed]


def _relate_pairs(solved: Matrices, gradients: LayerGradients) -> tuple[Tensor, Tensor]:
    """Return ``z^T v`` of each vector with its own gradient, and ``z^T z``, ``(V,)`` in float64."""
    dots, squares = [], []
    for rows in solved.runs():
        formed = solved.dense(rows).flatten(1)
        dots.append((formed * gradients.select(rows).dense()[0].to(formed.dtype).flatten(1)).sum(1).double())
        squares.append(formed.square().sum(1).double())
    return torch.cat(dots), torch.cat(squares)


def compute_best_step(inverse: BlockInverse, space: CompactSpace) -> float:
    """Return the factor of the preconditioner that is best for a compact space's directions.

    See :func:`~.two_level.rescale_inverse`: the directions are preconditioned anchors themselves.

    Args:
        inverse: ``P^{-1}``, with any damping.
        space: the coarse space.

    Returns:
        The factor; 1 if the directions are all zero.
    """
    rows = space.rows.values[:, :, space.num_probes :]
    rows = rows.reshape(*rows.shape[:2], -1, space.num_stages).sum(3)  # those of whole directions
    above, below = 0.0, float(rows.double().square().sum()) / space.normaliser
    for name, vectors in space.directions.items():
        for some in vectors.runs():
            formed = vectors.dense(some)
            damped = inverse.layers[name].damping * float(formed.double().square().sum())
            above += float((formed * space.inverse.layers[name].multiply(formed)).double().sum()) + damped
            below += damped
    return above / below if above > 0 and below > 0 else 1.0
