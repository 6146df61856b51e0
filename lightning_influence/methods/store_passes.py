"""Passes that build a gradient store: candidates of a sample, then the kept numbers of every example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.methods.kept_coordinates import KeptCoordinates
from lightning_influence.methods.rounding import Rounding
from lightning_influence.methods.scorers import PreconditionedScorer
from lightning_influence.methods.scoring_passes import refuse_non_finite
from lightning_influence.model.content import SeenData
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.support.mapped_rows import RowWriter

# Chosen by hand: training examples that stand for queries, and those whose scores for these are compared.
_ASKED, _COMPARED = 16, 256


class CandidatePass:
    """Collects the candidate coordinates of some examples.

    Args:
        plan: the covered layers.
        kept: the candidates.
    """

    description = "Influence: principal directions"

    def __init__(self, plan: LayerPlan, kept: KeptCoordinates) -> None:
        self.forward, self._kept = Forward(plan), kept
        self._parts: list[Tensor] = []

    @property
    def sample(self) -> Tensor:
        """The coordinates of all examples seen, ``(n, C)``."""
        return torch.cat(self._parts)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Collect one batch."""
        for gradients in self.forward(module, batch, len(indices)).loss_gradient_parts():
            self._parts.append(self._kept.take(gradients)[0].detach())


class StorePass:
    """Writes the kept numbers of every example, and compares the scores of a few pairs with exact ones.

    Args:
        plan: the covered layers.
        kept: what is kept of a gradient.
        writer: where it goes.
        batches: how many there will be.
        memory_budget: bytes that solutions of the first examples may take.

    Attributes:
        energy: of all examples: squared norms of what is kept, and of everything.
    """

    description = "Influence: gradient store"

    def __init__(
        self, plan: LayerPlan, kept: KeptCoordinates, writer: RowWriter, batches: int, memory_budget: int
    ) -> None:
        self.forward, self.losses, self.rounding = Forward(plan), SeenData(), Rounding(plan)
        self._kept, self._writer = kept, writer
        self._each = -(-_COMPARED // max(1, batches))
        self._budget = memory_budget
        self._scorer: PreconditionedScorer | None = None
        self._asked = torch.empty(0)
        self._indices: list[Tensor] = []
        self._scales: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.energy = [0.0, 0.0]

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Write one batch."""
        self.losses.read(batch, indices)
        captured = self.forward(module, batch, len(indices))
        self.losses.add(captured)
        start, left = 0, self._each
        for gradients in captured.loss_gradient_parts():
            numbers, squares = (found.detach() for found in self._kept.take(gradients))
            refuse_non_finite(numbers.mT, indices[start : start + len(numbers)])
            scales, rows = self._writer.add(numbers)
            start += len(numbers)
            self._scales.append(scales)
            self._squares.append(squares.cpu())
            self.energy[0] += float(rows.double().square().sum())
            self.energy[1] += float(squares.double().sum())
            left -= self._compare(gradients, numbers, rows, left)
            self.rounding.look(module, batch, len(indices), gradients, lambda few: self._kept.take(few)[0].mT)
        self._indices.append(indices.cpu())

    def _compare(
        self, gradients: Mapping[str, LayerGradients], numbers: Tensor, rows: Tensor, count: int
    ) -> int:
        """Compare the scores of at most ``count`` examples for the very first ones; return of how many."""
        start = 0
        if self._scorer is None:
            size = self._kept.inverse.layout.numel * numbers.element_size()
            start = max(1, min(_ASKED, self._budget // (2 * size), len(numbers) // 2))
            asked = {name: layer.select(slice(0, start)) for name, layer in gradients.items()}
            self._scorer = PreconditionedScorer(self._kept.inverse, asked, tolerance=0.0)
            self._asked = numbers[:start].cpu()
        others = {name: layer.select(slice(start, start + count)) for name, layer in gradients.items()}
        compared = rows[start : start + count]
        if len(compared):
            exact = self._scorer(others).detach().double().cpu()
            self._pairs.append((exact, (self._asked @ compared.mT).double()))
        return len(compared)

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Scores of the pairs that were compared, exact and from what is stored, ``(Q, n)`` both."""
        none = torch.zeros(len(self._asked), 0, dtype=torch.float64)
        exact = torch.cat([none, *(pair[0] for pair in self._pairs)], dim=1)
        return exact, torch.cat([none, *(pair[1] for pair in self._pairs)], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Return dataset indices, scales and whole squared norms of all examples, ``(N,)`` each."""
        return {
            "indices": torch.cat(self._indices),
            "scales": torch.cat(self._scales),
            "squares": torch.cat(self._squares),
        }


def compare_scores(exact: Tensor, found: Tensor) -> dict[str, float | int | None]:
    """Return how near scores ``(Q, n)`` are to exact ones.

    Returns:
        The ``relative_error`` in norm, the mean ``rank_correlation`` (Spearman's) of queries, None where
        scores do not differ, and the number of ``pairs`` that tell.
    """
    size = float(exact.norm())
    one, other = (_center_ranks(scores) for scores in (exact, found))
    norms = one.norm(dim=1) * other.norm(dim=1)
    correlations = ((one * other).sum(dim=1) / norms)[norms > 0]
    return {
        "relative_error": float((found - exact).norm()) / size if size > 0 else None,
        "rank_correlation": float(correlations.mean()) if len(correlations) else None,
        "pairs": exact.numel(),
    }


def _center_ranks(scores: Tensor) -> Tensor:
    """Return the rank of each score in its row, less the mean; equal scores have the first's rank."""
    ordered = scores.sort(dim=1).values.contiguous()
    ranks = torch.searchsorted(ordered, scores.contiguous()).double()
    return ranks - ranks.mean(dim=1, keepdim=True)
