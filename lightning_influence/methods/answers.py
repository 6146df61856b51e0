"""The answer to all queries: scores of all processes, each in the place where the result holds it.

Nothing of the answer's size is made beside it: scores go to their rows and columns as they are computed, and
are summed over processes and scaled in place.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.methods.context import Context
from lightning_influence.methods.gathering import Gathered
from lightning_influence.methods.groups import Groups
from lightning_influence.methods.position_parts import find_positions
from lightning_influence.methods.rounding import Rounding
from lightning_influence.methods.score_parts import LayerParts, ScoreParts, name_blocks
from lightning_influence.methods.scoring_passes import Columns, GroupSums, Sink
from lightning_influence.model.rounding import find_half_precision
from lightning_influence.results.top_k import Extremes, StreamingExtremes
from lightning_influence.support.waiting import settle

#: What scores can be told apart by.
By = Literal["layer", "block", "position"]

# Chosen by hand: bytes of scores that processes sum at once; where they communicate on a device of their own,
# so much is copied there and back.
_SUMMED = 64 * 2**20
# Chosen by hand: the share of the memory budget that the scores of a few examples for all queries of a group
# may take. Their ranking, or the products that they are sums of, take several times as much.
_SHARE = 16


class Answer:
    """Scores of all training examples for all queries, which come in groups and in order.

    Args:
        context: knows the training examples, the processes and the memory budget.
        num_queries: ``Q``.
        k: how many to keep at either end of each ranking; None for all scores.
        parts: of the scores that are kept as well; None for the scores alone.
        groups: of the training examples, whose scores are summed; None for a column an example.
        matrix: zeros ``(Q, N)`` that all scores go to, in memory or not; made here if None.
    """

    def __init__(
        self,
        context: Context,
        num_queries: int,
        k: int | None,
        *,
        parts: ScoreParts | None = None,
        groups: Groups | None = None,
        matrix: Tensor | None = None,
    ) -> None:
        self._context, self._count, self._k, self._groups = context, num_queries, k, groups
        self.parts = parts
        self._columns = context.train.indices.sort().values if groups is None else groups.positions
        self._tensors: dict[str, Tensor] = {}
        self._residuals: list[Tensor] = []
        self._rows = slice(0, 0)
        self._sink: Sink | None = None
        if matrix is not None:
            self._tensors["scores"] = matrix
        elif k is None:
            # Memory of zeros is not taken before it is written to. Processes write to their own columns.
            # Sums over groups are of many scores, and few enough to be kept in double precision.
            dtype = context.dtype if groups is None else torch.float64
            lead = () if parts is None else (parts.count,)
            self._tensors["scores"] = torch.zeros(*lead, num_queries, len(self._columns), dtype=dtype)

    def begin(self, count: int) -> Sink:
        """Return the sink of the next ``count`` queries' scores."""
        self._rows = slice(self._rows.stop, self._rows.stop + count)
        if self._k is not None:
            self._sink = StreamingExtremes(count, self._k)
        elif self.parts is not None:
            self._sink = _Parts(self)
        else:
            self._sink = self.make_sink()
        return self._sink

    def make_sink(self, parts: int | None = None) -> Sink:
        """Return what writes all scores of the queries that were begun.

        Args:
            parts: how many of the scores' parts there are; there is room for them afterwards.
        """
        if parts is not None:
            self._grow(parts)
        scores = self._scores()[:parts] if parts is not None else self._scores()
        return (
            Columns(scores, self._columns) if self._groups is None else GroupSums(scores, self._groups.find)
        )

    def _grow(self, parts: int) -> None:
        """Make room for further parts, as where an example is longer than those seen before."""
        scores = self._tensors["scores"]
        if len(scores) < parts:
            settle()  # what is still to be written to the smaller tensor
            more = scores.new_zeros(parts - len(scores), *scores.shape[1:])
            self._tensors["scores"] = torch.cat([scores, more])

    def count_examples(self) -> int:
        """Return how many training examples to score at once for the queries that were begun."""
        width = torch.empty((), dtype=self._context.dtype).element_size()
        rows = max(1, self._rows.stop - self._rows.start) * (1 if self.parts is None else self.parts.count)
        return max(1, self._context.options.memory_budget // (_SHARE * rows * width))

    def end(self, asked: Gathered, scale: float, residuals: Tensor | None) -> None:
        """Join what all processes have seen of the queries that were begun.

        Args:
            asked: the queries; their gradients are not needed.
            scale: positive factor of the scores.
            residuals: of the queries, ``(Q,)``, or None.
        """
        self._place("query_indices", asked.indices)
        self._place("query_dataloaders", asked.dataloaders)
        if residuals is not None:
            self._residuals.append(residuals.detach().float().cpu())
        if isinstance(self._sink, StreamingExtremes):
            found = self._gather(self._sink).scale(scale)
            for name, end in (("top", found.top), ("bottom", found.bottom)):
                self._place(f"{name}_scores", end.scores.cpu())
                self._place(f"{name}_indices", end.indices.cpu())
        else:
            if self.parts is not None:  # as many on all processes
                sizes = self._context.runner.all_gather_cat(torch.tensor([len(self._tensors["scores"])]))
                self._grow(int(sizes.max()))
            scores = self._scores().mul_(scale)
            for part in scores if self.parts is not None else [scores]:
                self._sum_in_place(part)
        self._sink = None

    def take(self, *, several: bool) -> tuple[dict[str, Any], Tensor | None]:
        """Return what attributions are made of, and the residuals ``(Q,)`` if there are any.

        Args:
            several: whether the queries are of several loaders.
        """
        fields: dict[str, Any] = {"train_indices": self._columns, **self._tensors}
        if self._groups is not None:
            fields |= {"train_names": self._groups.names, "train_counts": self._groups.counts}
            fields["scores"] = fields["scores"].to(self._context.dtype)
        if self.parts is not None:
            fields |= self.parts.finish(fields["scores"], self._context)
        if not several:
            del fields["query_dataloaders"]
        return fields, torch.cat(self._residuals) if self._residuals else None

    def _scores(self) -> Tensor:
        """Return the scores of the queries that were begun, ``(Q, N)`` or in parts ``(P, Q, N)``."""
        return self._tensors["scores"][..., self._rows, :]

    def _place(self, name: str, values: Tensor) -> None:
        if len(values) == self._count:
            self._tensors[name] = values
            return
        if name not in self._tensors:
            self._tensors[name] = values.new_empty(self._count, *values.shape[1:])
        self._tensors[name][self._rows] = values

    def _sum_in_place(self, scores: Tensor) -> None:
        """Sum scores over the processes: every column is zero on all but one of them."""
        runner = self._context.runner
        if runner.world_size > 1:
            rows = max(1, _SUMMED // max(1, scores[:1].nbytes))
            for part in torch.split(scores, rows):
                runner.all_reduce_sum(part)

    def _gather(self, sink: StreamingExtremes) -> Extremes:
        """Return both ends of the rankings of all processes."""
        found, runner = sink.result(), self._context.runner
        if runner.world_size == 1:
            return found
        # A process without examples knows no precision.
        ends = [end._replace(scores=end.scores.to(self._context.dtype)) for end in (found.top, found.bottom)]
        return found._replace(top=ends[0], bottom=ends[1]).gather(runner.all_gather_cat, sink.k)


class _Parts:
    """A sink of scores in parts, of which a batch may have fewer than another."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Take ``scores (P', Q, B)`` of the first ``P'`` parts."""
        self._answer.make_sink(len(scores)).update(scores, indices)


def find_parts(context: Context, by: By, shape: tuple[int, int]) -> ScoreParts:
    """Find the parts that scores are asked in, and refuse those that do not fit into the memory budget.

    Positions take a batch; nothing else has run before.

    Args:
        context: knows the layers and the budget.
        by: what they are parts by.
        shape: numbers of rows and of columns.

    Returns:
        The parts.

    Raises:
        ValueError: saying what to do.
    """
    names = list(context.plan.layers)
    parts: ScoreParts
    if by == "position":
        parts = find_positions(context)
    elif by == "block":
        parts = LayerParts(name_blocks(names), "block")
    else:
        parts = LayerParts({name: name for name in names})
    width = torch.empty((), dtype=context.dtype).element_size()
    (rows, columns), budget = shape, context.options.memory_budget
    needed = (parts.count + 1) * rows * columns * width
    if needed > budget:
        raise ValueError(
            f"Got {parts.describe()} x {rows} queries x {columns} training examples, which take "
            f"{needed / 2**20:.3g} MiB of memory_budget={budget / 2**20:.3g} MiB. Ask about fewer queries "
            "at a time or about means of them (aggregate=), sum over train_groups=, choose layers=, or raise "
            "memory_budget=."
        )
    return parts


def tell_rounding(context: Context, rounding: Rounding, residuals: Tensor | None) -> Tensor | None:
    """Say what half precision makes of an answer, which its residuals cannot: their system is rounded, too.

    Args:
        context: takes the note.
        rounding: what a pass over the training data has seen.
        residuals: of the answer, or None.

    Returns:
        The residuals, raised by the error that was measured, or else as they are.
    """
    dtype = find_half_precision(context.plan)
    if dtype is None:
        return residuals
    error, examples = rounding.reduce(context.runner.all_reduce_sum)
    told = (
        "how far, is not known, because the model does not run in float32"
        if error is None
        else f"with gradients in float32, scores of {examples} training examples change by {error:.2g} of "
        "their norm, to which rounding of the queries and of the curvature adds"
    )
    context.extra["rounding"] = error
    context.notes.add(
        f"The model is in {str(dtype).removeprefix('torch.')}, which rounds its gradients: {told}. Ask with "
        "the model in float32, as after model.float(), for scores without it."
    )
    return residuals if residuals is None or error is None else residuals.hypot(residuals.new_tensor(error))
