"""The scoring pass: inner products of solved queries with the gradient of every training example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_influence.model.forward import Forward
from lightning_influence.model.gradients import FactoredGradients, LayerGradients
from lightning_influence.model.mean_loss import LossSum
from lightning_influence.model.plan import LayerPlan
from lightning_influence.support.errors import NonFiniteError


class Scorer(Protocol):
    """Anything that turns training gradients into scores of all queries."""

    def __call__(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Inner products ``(Q, B)`` with gradients of ``B`` training examples."""
        ...


class Sink(Protocol):
    """Where scores go: a full matrix, or a running top-k."""

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Take ``scores (Q, B)`` of training examples ``indices (B,)``."""
        ...


class Columns:
    """A sink that keeps everything: ``(Q, N)`` in the order seen."""

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._indices: list[Tensor] = []

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Keep a block of columns on the CPU."""
        self._scores.append(scores.cpu())
        self._indices.append(indices.cpu())

    def result(self) -> tuple[Tensor, Tensor]:
        """Return ``(scores (Q, N), indices (N,))``, columns sorted by dataset index."""
        indices = torch.cat(self._indices)
        order = indices.argsort(stable=True)
        return torch.cat(self._scores, dim=1)[:, order], indices[order]


class ScorePass:
    """Runs over the training data once and hands every batch's scores to a sink.

    Scores are ``x_q^T g_n`` for unnormalised ``g_n``; divide by :attr:`mean_weight` and by ``N`` for the unit
    of an attribution.

    Args:
        plan: the covered layers.
        scorer: the solved queries.
        sink: where scores go.
    """

    description = "Influence: scores"

    def __init__(self, plan: LayerPlan, scorer: Scorer, sink: Sink) -> None:
        self.examples = 0
        self.weight = 0.0
        self.forward, self.losses = Forward(plan), LossSum()
        self._scorer, self._sink = scorer, sink

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Score one batch."""
        parts, weight = _loss_gradients(self, module, batch, len(indices))
        scores = _joined([self._scorer(gradients) for gradients in parts])
        refuse_non_finite(scores, indices)
        self._sink.update(scores, indices)
        self.examples += len(indices)
        self.weight += weight

    @property
    def mean_weight(self) -> float:
        """``wbar`` over the training data."""
        return self.weight / self.examples if self.weight > 0 else 1.0


class SelfInfluencePass:
    """``g_n^T (.)^{-1} g_n`` of every training example, in one pass and without a matrix of scores.

    Args:
        plan: the covered layers.
        quadratic: maps gradients of a batch to ``(B,)``.
        description: label of the progress bar.
    """

    def __init__(
        self, plan: LayerPlan, quadratic: Any, *, description: str = "Influence: self-influence"
    ) -> None:
        self.description = description
        self.values: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.examples = 0
        self.weight = 0.0
        self.forward, self.losses = Forward(plan), LossSum()
        self._quadratic = quadratic

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Score one batch."""
        parts, weight = _loss_gradients(self, module, batch, len(indices))
        values = _joined([self._quadratic(gradients) for gradients in parts])
        refuse_non_finite(values, indices)
        self.values.append(values.detach().cpu())
        self.indices.append(indices.cpu())
        self.examples += len(indices)
        self.weight += weight

    def gathered(
        self, all_gather_cat: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Join what all processes have seen.

        Args:
            all_gather_cat: concatenates a tensor's rows over the processes.
            dtype: of the values; a process without examples knows none.

        Returns:
            Dataset indices, ascending, and their values, each ``(N,)``.
        """
        indices = all_gather_cat(torch.cat([torch.empty(0, dtype=torch.int64), *self.indices]))
        empty = torch.empty(0, dtype=dtype)
        values = all_gather_cat(torch.cat([empty, *(part.to(dtype) for part in self.values)]))
        order = indices.argsort(stable=True)
        return indices[order], values[order]

    @property
    def mean_weight(self) -> float:
        """``wbar`` over the training data."""
        return self.weight / self.examples if self.weight > 0 else 1.0


def _loss_gradients(
    one_pass: ScorePass | SelfInfluencePass, module: Any, batch: Any, num_examples: int
) -> tuple[Iterator[dict[str, FactoredGradients]], float]:
    """Return the gradients of a batch, in runs, and its summed loss weight; the pass notes the losses."""
    captured = one_pass.forward(module, batch, num_examples)
    one_pass.losses.add(captured)
    weight = float(captured.weights.sum())
    return captured.loss_gradient_parts(), weight


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def refuse_non_finite(scores: Tensor, indices: Tensor) -> None:
    """Refuse NaN and infinity.

    Args:
        scores: ``(..., B)``.
        indices: dataset indices ``(B,)``.

    Raises:
        NonFiniteError: naming the training examples.
    """
    if bool(torch.isfinite(scores.sum())):
        return
    bad = indices[~torch.isfinite(scores).reshape(-1, scores.shape[-1]).all(dim=0).cpu()].tolist()
    raise NonFiniteError(
        f"Scores of {len(bad)} training examples are not finite (dataset indices {bad[:5]}). Check these "
        "examples for NaN or infinity, or raise the damping."
    )
