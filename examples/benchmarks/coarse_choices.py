"""What a coarse space of two-level EK-FAC can be made of: the kinds that ``coarse_vectors.py`` compares."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from ladder_matrices import Source
from ladder_tasks import LadderTask
from tasks import Task, TensorTable
from torch import Tensor
from truth import Truth
from unrolling import FactoredCurvature

from lightning_influence import InfluenceModule
from lightning_influence.curvature.coarse_space import (
    CoarseSpace,
    build_directions,
    draw_probes,
    extend_space,
)
from lightning_influence.curvature.damping import resolve_damping
from lightning_influence.curvature.operators import GaussNewtonOperator
from lightning_influence.curvature.two_level import TwoLevel
from lightning_influence.methods.closed_form import invert_blocks, take_eigenvalues
from lightning_influence.model.layers.gradients import DenseGradients

PROBES = 16
MIXED = 8


class Problem:
    """A trained task, its factors and its gradients as flat float32 vectors.

    Args:
        entry: the task.
        largest: size of the largest space.
    """

    def __init__(self, entry: LadderTask, largest: int) -> None:
        self.task, self.largest = entry.task, largest
        self.source = Source(entry.task)
        self.layout, self.operator = self.source.layout, GaussNewtonOperator(self.source)
        self.train = self.source.gradients(self.task.train).float()
        queries = self.source.gradients(self.task.queries).float()
        self.previous, self.asked = queries[1::2], queries[::2]
        factors = InfluenceModule(self.source.module).fit_factors(self.task.pass_loader())
        damping, _ = resolve_damping("auto", factors, self.source.record, solver="full")
        self.inverse = invert_blocks(self.layout, factors, damping, take_eigenvalues)
        self.damping = self.layout.expand(damping, self.train)
        truth = entry.truth(0.5, "loss")
        self.truth = Truth(truth.masks, truth.losses[..., ::2])

    def system(self, vectors: Tensor) -> Tensor:
        """Return ``(G + lambda) V``."""
        return self.operator.product(vectors) + self.damping * vectors

    @cached_property
    def leverage(self) -> Tensor:
        """``g^T P^{-1} g`` of every training gradient, ``(N,)``."""
        return (self.train * self.inverse.apply(self.train)).sum(1)

    @cached_property
    def probe_product(self) -> Tensor:
        """Products that price residuals."""
        return self.operator.product(draw_probes(PROBES, self.layout.numel, self.train))

    def gradients(self, vectors: Tensor) -> dict[str, DenseGradients]:
        """Return flat vectors as gradients by layer."""
        return {name: DenseGradients(part[None]) for name, part in self.layout.split(vectors).items()}

    def grown(self, space: CoarseSpace | None, anchors: Tensor) -> CoarseSpace:
        """Return the space with further anchors ``(k, P)``."""
        if space is not None:
            return extend_space(
                space, self.inverse.apply(anchors), self.gradients(anchors), self.operator.product
            )
        named = self.gradients(anchors)
        basis, mixing = build_directions(self.layout, self.inverse, named)
        product, count = self.operator.product(basis), len(self.task.train)
        return CoarseSpace(
            self.layout, basis, product, self.probe_product, mixing, named, self.inverse, count
        )

    def scores(self, solved: Tensor) -> Tensor:
        """Return scores ``(Q, N)`` of answers ``(Q, P)``."""
        return (solved @ self.train.T).double() / len(self.train)

    def residual(self, solved: Tensor) -> float:
        """Return the median relative residual of answers to the held-out queries."""
        remainder = self.asked - self.system(solved)
        return float((remainder.norm(dim=1) / self.asked.norm(dim=1)).median())


Chooser = Callable[[Problem, CoarseSpace | None, int, int], Tensor]


def _order(problem: Problem, seed: int) -> Tensor:
    return torch.randperm(len(problem.train), generator=torch.Generator().manual_seed(seed))


def training(seed: int) -> Chooser:
    """Random training gradients."""
    return lambda problem, space, start, stop: problem.train[_order(problem, seed)[start:stop]]


def sampled_labels(problem: Problem, space: CoarseSpace | None, start: int, stop: int) -> Tensor:
    """Gradients of random training examples at labels that the model draws."""
    chosen, task = _order(problem, 0)[start:stop], problem.task
    inputs = task.train.tensors[0][chosen]
    targets = draw_labels(task, problem.source.module(inputs).detach(), start)
    return problem.source.gradients(TensorTable(inputs, targets)).float()


def draw_labels(task: Task, outputs: Tensor, seed: int) -> Tensor:
    """Return labels of the model's own distribution, for classes ``(B, C)`` and regressions ``(B, d)``."""
    generator = torch.Generator().manual_seed(seed)
    if task.loss == "cross_entropy":
        return torch.multinomial(outputs.softmax(-1), 1, generator=generator).squeeze(-1)
    if task.loss == "mse":
        return outputs + torch.randn(outputs.shape, generator=generator) * (outputs.shape[-1] / 2) ** 0.5
    raise NotImplementedError(f"No labels are drawn for {task.loss}.")


def mixtures(each: int | None) -> Chooser:
    """Sums of ``each`` random training gradients with random signs; of all of them if None."""

    def choose(problem: Problem, space: CoarseSpace | None, start: int, stop: int) -> Tensor:
        generator, count = torch.Generator().manual_seed(start), len(problem.train)
        signs = torch.randint(0, 2, (stop - start, count), generator=generator).mul(2.0).sub(1)
        if each is not None:
            kept = torch.rand(signs.shape, generator=generator).argsort(1) < each
            signs = signs * kept
        return signs @ problem.train

    return choose


def leverage(problem: Problem, space: CoarseSpace | None, start: int, stop: int) -> Tensor:
    """Training gradients of the largest ``g^T P^{-1} g``."""
    return problem.train[problem.leverage.argsort(descending=True)[start:stop]]


def leverage_sampled(problem: Problem, space: CoarseSpace | None, start: int, stop: int) -> Tensor:
    """Training gradients drawn without replacement in proportion to ``g^T P^{-1} g``."""
    generator = torch.Generator().manual_seed(0)
    return problem.train[
        torch.multinomial(problem.leverage, problem.largest, generator=generator)[start:stop]
    ]


def residual(problem: Problem, space: CoarseSpace | None, start: int, stop: int) -> Tensor:
    """Random ones first, then each time those of the largest ``||v - A x||`` in the space so far."""
    if space is None:
        return training(0)(problem, space, start, stop)
    operator = TwoLevel(problem.inverse, space)
    relative = torch.cat([
        operator.correction(problem.gradients(some))[1] for some in problem.train.split(256)
    ])
    return problem.train[(relative * problem.train.norm(dim=1)).argsort(descending=True)[: stop - start]]


def worst_directions(iterations: int) -> Chooser:
    """Where EK-FAC is most wrong: leading eigenvectors of ``P^{-1} A - I``, by subspace iteration.

    A single iteration starts from mixtures of all training gradients, two of them from random vectors.
    """

    def choose(problem: Problem, space: CoarseSpace | None, start: int, stop: int) -> Tensor:
        generator = torch.Generator().manual_seed(start)
        change = torch.randn(stop - start, problem.layout.numel, generator=generator)
        if iterations == 1:
            change = mixtures(None)(problem, space, start, stop)
        for _ in range(iterations):
            kept = problem.inverse.apply(change)
            if space is not None:
                kept = kept - (kept @ space.directions.T) @ space.directions
            kept = torch.linalg.qr(kept.T).Q.T.contiguous()
            change = problem.system(kept) - _precondition(problem, kept)
        return change  # the space applies P^{-1} itself

    return choose


def _precondition(problem: Problem, vectors: Tensor) -> Tensor:
    """Return ``P V``."""
    damping = next(iter(problem.inverse.damping.values()))
    return FactoredCurvature(problem.inverse).apply(lambda values: values + damping, vectors.double()).float()


def queries_first(which: str) -> Chooser:
    """Gradients of the ``previous`` or the ``asked`` queries, then training gradients."""

    def choose(problem: Problem, space: CoarseSpace | None, start: int, stop: int) -> Tensor:
        pool = torch.cat([getattr(problem, which), problem.train[_order(problem, 0)]])
        return pool[start:stop]

    return choose


# Each with the products that choosing a direction takes.
KINDS: dict[str, tuple[Chooser, int]] = {
    "training gradients": (training(0), 0),
    "another draw": (training(1), 0),
    "sampled labels": (sampled_labels, 0),
    f"mixtures of {MIXED}": (mixtures(MIXED), 0),
    "mixtures of all": (mixtures(None), 0),
    "highest leverage": (leverage, 0),
    "drawn by leverage": (leverage_sampled, 0),
    "largest residual": (residual, 0),
    "EK-FAC's worst, 1 step": (worst_directions(1), 1),
    "EK-FAC's worst": (worst_directions(2), 2),
    "previous queries first": (queries_first("previous"), 0),
    "the asked queries first": (queries_first("asked"), 0),
}
