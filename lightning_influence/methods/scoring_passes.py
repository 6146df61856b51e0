"""The scoring pass: inner products of solved queries with the gradient of every training example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_influence.methods.rounding import Rounding
from lightning_influence.methods.score_parts import ScoreParts
from lightning_influence.model.content import SeenData
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.support.errors import NonFiniteError
from lightning_influence.support.waiting import read_later


class Scorer(Protocol):
    """Anything that turns training gradients into scores of all queries."""

    def __call__(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Inner products ``(Q, B)`` with gradients of ``B`` training examples."""
        ...


class LayeredScorer(Scorer, Protocol):
    """A scorer that can tell layers apart."""

    def by_layer(self, gradients: Mapping[str, LayerGradients]) -> dict[str, Tensor]:
        """What each layer adds to the inner products, ``(Q, B)`` by name; one that adds nothing may miss."""
        ...


class Sink(Protocol):
    """Where scores go: a full matrix, sums over groups, or a running top-k."""

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Take ``scores (..., Q, B)`` of training examples ``indices (B,)``."""
        ...


class Columns:
    """A sink that keeps everything: each score is written once, to its place in the answer.

    Args:
        scores: the answer's rows, ``(..., Q, N)``, written to in place.
        indices: dataset indices of its columns, ascending, ``(N,)``.
    """

    def __init__(self, scores: Tensor, indices: Tensor) -> None:
        self._scores, self._indices = scores, indices

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Write the columns of some examples."""
        columns = torch.searchsorted(self._indices, indices.cpu())
        scores = scores.detach().to(self._scores.dtype)
        read_later(scores, lambda found: self._scores.index_copy_(-1, columns, found))


class GroupSums:
    """A sink that adds up the scores of every group of training examples.

    Args:
        scores: the answer's rows, ``(..., Q, groups)``, added to in place.
        find: maps dataset indices ``(B,)`` to columns ``(B,)``.
    """

    def __init__(self, scores: Tensor, find: Callable[[Tensor], Tensor]) -> None:
        self._scores, self._find = scores, find

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Add some examples to the columns of their groups."""
        columns, scores = self._find(indices), scores.detach().to(self._scores.dtype)
        read_later(scores, lambda found: self._scores.index_add_(-1, columns, found))


class ScorePass:
    """Runs over the training data once and hands every batch's scores to a sink.

    Scores are ``x_q^T g_n`` for unnormalised ``g_n``; divide by the mean loss weight and by ``N``, which
    ``losses`` knows, for the unit of an attribution.

    Args:
        plan: the covered layers.
        scorer: the solved queries.
        sink: where scores go.
        most_examples: how many examples of a batch are scored at once.
        parts: of the scores that are told apart, ``(P, Q, B)``; None for sums.
    """

    description = "Influence: scores"

    def __init__(
        self,
        plan: LayerPlan,
        scorer: Scorer,
        sink: Sink,
        *,
        most_examples: int | None = None,
        parts: ScoreParts | None = None,
    ) -> None:
        self.forward, self.losses = Forward(plan), SeenData()
        self._scorer, self._sink, self._most, self._parts = scorer, sink, most_examples, parts
        self.rounding = Rounding(plan)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Score one batch."""
        self.losses.read(batch, indices)
        captured = self.forward(module, batch, len(indices))
        self.losses.add(captured)
        if self._parts is not None:
            self._parts.look(captured)
        start = 0
        for gradients in captured.loss_gradient_parts():
            for few in split_examples(gradients, self._most):
                scores = self._score(few)
                rows = indices[start : start + scores.shape[-1]]
                refuse_non_finite(scores, rows)
                self._sink.update(scores, rows)
                start += scores.shape[-1]
                self.rounding.look(module, batch, len(indices), few, self._scorer)

    def help(self) -> None:
        """Take part in what other processes ask of the scorer."""
        help_with(self._scorer)

    def _score(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        """Return scores ``(Q, B)``, or their parts ``(P, Q, B)``."""
        if self._parts is None:
            return self._scorer(gradients)
        return self._parts.score(self._scorer, gradients)


def split_examples(
    gradients: Mapping[str, LayerGradients], most: int | None
) -> Iterator[Mapping[str, LayerGradients]]:
    """Yield gradients a few examples at a time.

    Args:
        gradients: of some examples, by layer.
        most: how many at a time; None for all at once.
    """
    count = next((layer.num_examples for layer in gradients.values()), 0)
    if most is None or count <= most:
        yield gradients
        return
    for start in range(0, count, most):
        yield {name: layer.select(slice(start, start + most)) for name, layer in gradients.items()}


Quadratic = Callable[[Mapping[str, LayerGradients]], Tensor | tuple[Tensor, Tensor | None]]
"""Maps gradients of ``B`` examples to ``g^T (.)^{-1} g``, ``(B,)``, or to these and residuals ``(B,)``."""


@dataclass(frozen=True)
class SelfScores:
    """``g_n^T (.)^{-1} g_n`` of every training example, of all processes.

    Attributes:
        indices: dataset indices, ascending, ``(N,)``.
        values: ``(N,)``.
        residuals: relative residual of each example's system, ``(N,)``; None if it is solved exactly.
    """

    indices: Tensor
    values: Tensor
    residuals: Tensor | None = None


class SelfInfluencePass:
    """``g_n^T (.)^{-1} g_n`` of every training example, in one pass and without a matrix of scores.

    Args:
        plan: the covered layers.
        quadratic: maps gradients of a batch to their values.
        description: label of the progress bar.

    Attributes:
        columns: of the output curvature of an example, as far as this process has seen; 0 if not known.
    """

    def __init__(
        self, plan: LayerPlan, quadratic: Quadratic, *, description: str = "Influence: self-influence"
    ) -> None:
        self.description = description
        self.forward, self.losses = Forward(plan), SeenData()
        self._values: list[Tensor] = []
        self._residuals: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._quadratic = quadratic
        self.columns = 0
        self.rounding = Rounding(plan)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Score one batch."""
        self.losses.read(batch, indices)
        captured = self.forward(module, batch, len(indices))
        self.losses.add(captured)
        if captured.loss is not None:
            self.columns = max(self.columns, captured.loss.num_columns)
        found = []
        for gradients in captured.loss_gradient_parts():
            found.append(self._quadratic(gradients))
            self.rounding.look(module, batch, len(indices), gradients, self._find_values)
        pairs = [pair if isinstance(pair, tuple) else (pair, None) for pair in found]
        values = _join([value for value, _ in pairs])
        refuse_non_finite(values, indices)
        self._values.append(values.detach())
        self._residuals += [part.detach() for _, part in pairs if part is not None]
        self._indices.append(indices.cpu())

    def help(self) -> None:
        """Take part in what other processes ask of the quadratic."""
        help_with(self._quadratic)

    def _find_values(self, gradients: Mapping[str, LayerGradients]) -> Tensor:
        found = self._quadratic(gradients)
        return found[0] if isinstance(found, tuple) else found

    def gather(self, all_gather_cat: Callable[[Tensor], Tensor], dtype: torch.dtype) -> SelfScores:
        """Join what all processes have seen.

        Args:
            all_gather_cat: concatenates a tensor's rows over the processes.
            dtype: of the values; a process without examples knows none.

        Returns:
            The values by dataset index.
        """
        empty = torch.empty(0, dtype=dtype)
        indices = all_gather_cat(torch.cat([torch.empty(0, dtype=torch.int64), *self._indices]))
        values, residuals = (
            all_gather_cat(torch.cat([part.to(dtype) for part in parts]).cpu() if parts else empty)
            for parts in (self._values, self._residuals)
        )
        order = indices.argsort(stable=True)
        return SelfScores(indices[order], values[order], residuals[order] if len(residuals) else None)


def help_with(part: Scorer | Quadratic) -> None:
    """Take part in what other processes ask of a scorer or a quadratic, see ``owners``."""
    shared: Any = part
    shared.help()


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def refuse_non_finite(scores: Tensor, indices: Tensor) -> None:
    """Refuse NaN and infinity.

    Args:
        scores: ``(..., B)``.
        indices: dataset indices ``(B,)``.

    Raises:
        NonFiniteError: naming the training examples.
    """
    if scores.is_cpu and bool(torch.isfinite(scores.sum())):
        return

    def take(finite: Tensor) -> None:
        bad = indices[~finite].tolist()
        if bad:
            raise NonFiniteError(
                f"Scores of {len(bad)} training examples are not finite (dataset indices {bad[:5]}). Check "
                "these examples for NaN or infinity, or raise the damping."
            )

    read_later(torch.isfinite(scores.detach()).reshape(-1, scores.shape[-1]).all(dim=0), take)
