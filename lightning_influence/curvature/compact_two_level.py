"""Two-level EK-FAC with a compact coarse space: the same answers, for a pass over the curvature examples.

The answer is that of :mod:`~.two_level`, ``x = z + Q T^{-1} (Q^T v - (A Q)^T z)``, with ``A Q`` never formed:
``(A Q)^T z = (B^T J Q)^T (B^T J z) / N + lambda Q^T z`` takes the rows of ``z``, one pass for all queries.
These rows tell ``z^T A z`` as well, and so the step ``t`` of the best ``x = t z + Q c`` in the norm of ``A``:
where directions are few, ``z`` overshoots outside of them, and a step below 1 mends it. And they tell as much
of the answer of a second closed form, which may be the better ``z``, with directions or without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.curvature.compact_solving import solve_within
from lightning_influence.curvature.compact_space import CompactSpace, CurvatureRows, compute_gram
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


@dataclass(frozen=True)
class CompactCorrection:
    """Corrected answers: ``x = t z + Q c`` with ``z`` and the directions in low rank.

    Attributes:
        coefficients: ``c`` of the parts of the directions in all stages, ``(Q, m S)``.
        space: holds the directions.
        solved: ``z`` by layer, as far as it is not cut.
        steps: ``t``, ``(Q,)``.
        shortened: how many of the answers have another length than is best in the norm of ``A``.
    """

    coefficients: Tensor
    space: CompactSpace
    solved: Mapping[str, Matrices]
    steps: Tensor
    shortened: int = 0

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


@dataclass(frozen=True)
class _Form:
    """A closed form's answers in the system that is to be solved.

    Attributes:
        first: place of its first answer among those of all forms.
        factor: of the answers as they are held.
        image: ``[W, Q]^T A z``, ``(Q, s + m S)``.
        along: ``z^T v``, ``(Q,)``.
        curved: ``z^T A z``, ``(Q,)``.
    """

    first: int
    factor: float
    image: Tensor
    along: Tensor
    curved: Tensor


@dataclass(frozen=True)
class _Tried:
    """One way to answer: of which form, the steps ``t``, ``c``, and the remainders at the probes."""

    form: _Form
    steps: Tensor
    coefficients: Tensor
    remainders: Tensor


@dataclass(frozen=True)
class _Choice:
    """Which of several ways to answer each query is best, ``(Q,)``, and the length it is best in."""

    best: Tensor
    lengths: Tensor

    def leave(self, remainders: Tensor, seen: Tensor) -> Tensor:
        """Return what is left at probes, ``(Q, s)``, of what is left by every way ``(ways, Q, s)``."""
        left = remainders[self.best, torch.arange(len(seen), device=seen.device)]
        return seen - self.lengths[:, None] * (seen - left)


def _choose(remainders: Tensor, seen: Tensor, scale: Tensor, tolerance: float) -> _Choice:
    """Choose by what probes see.

    Args:
        remainders: what every way leaves, ``(ways, Q, s)``; the first one is taken where it is tolerated.
        seen: what there is, ``(Q, s)``.
        scale: squared norms of the queries, ``(Q,)``.
        tolerance: as in :meth:`CompactTwoLevel.compare`.

    Returns:
        For each query the best way, in a length other than 1 only where it would be worse than nothing.
    """
    residuals = (remainders.square().mean(dim=2) / scale).sqrt()
    best = residuals.nan_to_num(nan=math.inf).argmin(dim=0)
    best = torch.where(residuals[0] > tolerance, best, torch.zeros_like(best))
    plain = _Choice(best, torch.ones_like(scale))
    # What is best in the norm of A may be longer than nothing at all is off in the norm of residuals. Its
    # length is then the one that is best in that norm.
    answers = seen - plain.leave(remainders, seen)
    lengths = (answers * seen).sum(dim=1) / answers.square().sum(dim=1)
    left = (seen - lengths[:, None] * answers).square().mean(dim=1)
    own = residuals.gather(0, best[None])[0]
    long = (own > max(1.0, tolerance)) & (lengths > 0) & (left < own.square() * scale)
    return _Choice(best, torch.where(long, lengths, plain.lengths))


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
        probes, rows = space.num_probes, space.rows.values
        self._dtype = rows.dtype
        small = compute_gram(rows, rows[:, :, probes:]) / space.normaliser  # [W, Q]^T G Q
        for name, damping in inverse.damping.items():
            if damping:
                vectors, columns = space.directions[name], space.columns(name)
                small[probes:][columns, columns] += damping * vectors.inner(vectors)
                small[:probes, columns] += damping * space.probes[name].inner(vectors)
        self._residual_coarse = small[:probes]  # W^T A Q, (s, m S)
        self.small = (small[probes:] + small[probes:].T) / 2
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
                Where that is above 1 still, answers are shortened, so that they are better than none.

        Returns:
            The answers; the estimated relative residual ``||v - A x|| / ||v||`` of each query, ``(Q,)``; and
            that of the other closed form's answers in the same system, ``(Q,)``.
        """
        space, probes = self.space, self.space.num_probes
        right = self.small.new_zeros(answers.along.shape[1], probes + len(self.small))  # [W, Q]^T v
        for name, gradients in queries.items():
            right[:, :probes] += space.probes[name].dot(gradients)[0]
            right[:, probes:][:, space.columns(name)] += space.directions[name].dot(gradients)[0]
        forms = self._place(answers, self._find_rows(answers.vectors) if rows is None else rows)

        seen = right[:, :probes]
        plain = torch.ones_like(forms[0].along)
        tried = [_Tried(forms[0], plain, *self._correct(right - forms[0].image))]
        tried += [self._take_best_step(form, right) for form in forms]
        if len(forms) > 1:
            own = forms[1].image[:, :probes]
            steps = (own * seen).sum(dim=1) / own.square().sum(dim=1)
            steps = torch.where(steps.isfinite(), steps, plain)
            nothing = torch.zeros_like(tried[0].coefficients)
            tried.append(_Tried(forms[1], steps, nothing, seen - steps[:, None] * own))
        remainders = torch.stack([one.remainders for one in tried])
        scale = square_norms(queries).double().clamp_min(torch.finfo(torch.float64).tiny)
        chosen = _choose(remainders, seen, scale, tolerance)
        best, each = chosen.best, torch.arange(len(plain), device=plain.device)
        coefficients = torch.stack([one.coefficients for one in tried])[best, each]
        steps = torch.stack([one.steps * one.form.factor for one in tried])[best, each]
        bases = torch.tensor([one.form.first for one in tried], device=best.device)[best]
        correction = CompactCorrection(
            (coefficients * chosen.lengths[:, None]).to(self._dtype),
            space,
            {name: vectors.select(bases + each) for name, vectors in answers.vectors.items()},
            (steps * chosen.lengths).to(self._dtype),
            int((chosen.lengths != 1).sum()),
        )
        # What is best by some probes looks better to them than it is: the others tell how good it is.
        halves = [slice(0, None, 2), slice(1, None, 2)]
        told = torch.zeros_like(scale)
        for half, rest in (halves, halves[::-1]):
            choice = _choose(remainders[..., half], seen[:, half], scale, tolerance)
            told += choice.leave(remainders[..., rest], seen[:, rest]).square().sum(dim=1)
        residuals = (told / probes / scale).sqrt().to(self._dtype)
        closed_residuals = self._relate(seen - forms[-1].image[:, :probes], queries)
        return correction, residuals, closed_residuals

    def _place(self, answers: ClosedAnswers, rows: CurvatureRows) -> list[_Form]:
        """Return what the curvature, with its damping, makes of the closed forms' answers."""
        found, count = answers.along.shape
        image = self.small.new_zeros(found * count, self.space.num_probes + len(self.small))
        curved = self._add_image(image, answers.vectors, rows).view(found, count) + answers.damped
        images = image.view(found, count, -1)
        kinds = [(0, self.step), (found - 1, 1.0)]
        return [
            _Form(
                one * count,
                factor,
                factor * images[one],
                factor * answers.along[one],
                factor**2 * curved[one],
            )
            for one, factor in dict.fromkeys(kinds)
        ]

    def _correct(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``c`` for what is left of ``[W, Q]^T v``, and the remainders that the probes then see."""
        probes = self.space.num_probes
        coefficients = self._galerkin.solve(left[:, probes:])
        return coefficients, left[:, :probes] - coefficients @ self._residual_coarse.T

    def _take_best_step(self, form: _Form, right: Tensor) -> _Tried:
        """Return ``t z + Q c`` with the ``t`` and ``c`` that are best in the norm of ``A``."""
        probes, image = self.space.num_probes, form.image
        inside = self._galerkin.solve(image[:, probes:])
        rest = form.curved - (inside * image[:, probes:]).sum(dim=1)
        steps = (form.along - (inside * right[:, probes:]).sum(dim=1)) / rest
        steps = torch.where((rest > 0) & steps.isfinite(), steps, torch.ones_like(steps))
        return _Tried(form, steps, *self._correct(right - steps[:, None] * image))

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

    def _add_image(self, image: Tensor, solved: Mapping[str, Matrices], found: CurvatureRows) -> Tensor:
        """Add ``[W, Q]^T A z`` of vectors by layer to ``(V, s + m S)`` and return ``z^T G z``; in float64."""
        space = self.space
        columns = found.values.shape[1]  # of this process's examples: others may have more
        for some in torch.split(torch.arange(len(found.indices)), _EXAMPLES):
            rows = space.rows.find(found.indices[some])[:, :columns]
            image += compute_gram(found.values[some], rows) / space.normaliser
        squares = found.values.double().square().sum(dim=(0, 1)) / space.normaliser
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
