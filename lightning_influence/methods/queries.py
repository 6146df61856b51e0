"""What is asked about: single queries, means of groups of them, or batches that are measured as a set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_influence.methods.aggregating import gather_means
from lightning_influence.methods.context import Context
from lightning_influence.methods.gathering import Gathered, GradientPass, gather
from lightning_influence.methods.groups import GroupLabels, Groups, join_all, read_groups
from lightning_influence.methods.sets import gather_sets, gives_one_number
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.measurements import ResolvedMeasurement
from lightning_influence.support.errors import UnsupportedDataError
from lightning_influence.support.passes import Loader

Aggregate = Literal["mean"] | GroupLabels

# Chosen by hand: queries that tell how much memory one takes.
_TRIED = 4


@dataclass(frozen=True)
class Queries:
    """The queries of a question.

    Attributes:
        measured: what is measured on them.
        loaders: all of them; of sets, loaders whose batches stay whole.
        groups: that are asked about as one query each; None for single examples.
        are_sets: whether the measurement gives one number for a batch. Groups are then of batches.
    """

    measured: ResolvedMeasurement
    loaders: Sequence[Loader]
    groups: Groups | None
    are_sets: bool = False

    @property
    def count(self) -> int:
        """How many questions there are, ``Q``."""
        if self.groups is not None:
            return len(self.groups.names)
        return sum(loader.num_examples for loader in self.loaders)

    @property
    def are_of_several_loaders(self) -> bool:
        """Whether the loader of each query is to be told."""
        return len(self.loaders) > 1 and self.groups is None

    def describe(self, context: Context) -> None:
        """Say what the queries are where the measurement decides it."""
        if not self.are_sets:
            return
        sizes = [len(batch) for loader in self.loaders for batch in loader.batches]
        context.extra["set_sizes"] = sizes
        many = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{max(sizes)}"
        context.notes.inform(
            f"{self.measured.hint} returns one number for a batch, so that each batch is one query: "
            f"{len(sizes)}, of {many} examples."
        )

    def gather(self, context: Context) -> Gathered:
        """Return the gradients of all of them, on every process."""
        if self.groups is None:
            return self._gather_examples(context, self.loaders)
        return self._gather_groups(context, range(self.count))

    def in_groups(
        self, context: Context, rows: int, measure_rows: Callable[[dict[str, LayerGradients]], int] | None
    ) -> Iterator[Gathered]:
        """Yield gradients, of as many queries at a time as the method takes under the memory budget.

        Args:
            context: runs the passes.
            rows: how many queries the method takes at once.
            measure_rows: how many it takes, as gradients of a few tell it; None if ``rows`` is right.
        """
        count = self.count
        if self.groups is not None:
            every = range(count)
            for start in every[::rows]:
                yield self._gather_groups(context, every[start : start + rows])
            return
        if rows < count and measure_rows is not None:
            few = self._gather_examples(context, self.loaders[0].parts(min(rows, _TRIED))[:1])
            rows = measure_rows(few.gradients)
        if rows >= count:
            yield self._gather_examples(context, self.loaders)
            return
        for number, loader in enumerate(self.loaders):
            for part in loader.parts(rows):
                found = self._gather_examples(context, [part])
                found = replace(found, dataloaders=torch.full_like(found.dataloaders, number))
                groups = [slice(start, start + rows) for start in range(0, len(found.indices), rows)]
                yield from [found] if len(groups) == 1 else map(found.select, groups)

    def _gather_examples(self, context: Context, loaders: Sequence[Loader]) -> Gathered:
        return gather(context, GradientPass(context.plan, self._measure), loaders)

    def _gather_groups(self, context: Context, rows: range) -> Gathered:
        assert self.groups is not None
        if self.are_sets:
            return gather_sets(context, self.measured, self.loaders, self.groups, rows)
        return gather_means(context, self._measure, self.loaders, self.groups, rows)

    @property
    def _measure(self) -> ResolvedMeasurement | None:
        """What passes differentiate: None for the training loss."""
        return None if self.measured.is_loss else self.measured


def read_queries(
    runner: Any, measured: ResolvedMeasurement, loaders: Sequence[Loader], aggregate: Aggregate | None
) -> Queries:
    """Read what is asked about.

    Args:
        runner: runs a first batch where a function of the user's decides what a query is.
        measured: what is measured.
        loaders: the queries' loaders.
        aggregate: ``"mean"``, or labels of the queries; None for a question about each.

    Returns:
        The queries.

    Raises:
        UnsupportedDataError: if batches that are sets have lost examples to batches before them.
        ValueError: if labels do not fit.
        TypeError: if a label is no text and no integer.
    """
    if not gives_one_number(runner, measured, loaders[0]):
        if aggregate is None:
            return Queries(measured, loaders, None)
        for loader in loaders:
            runner.agree(loader)
        return Queries(measured, loaders, _read_groups(loaders, aggregate))
    if any(loader.repeats for loader in loaders):
        raise UnsupportedDataError(
            f"{measured.hint} returns one number for a batch, and batches of the query loader have examples "
            "in common, each of which is visited once only. Pass sets that overlap as several loaders, or as "
            "a list of ready-made batches."
        )
    loaders = [loader.in_batches() for loader in loaders]
    for loader in loaders:
        runner.agree(loader)
    sets = [_Sets(torch.arange(len(loader)), len(loader)) for loader in loaders]
    if aggregate is None:
        groups = _number(sets)
    else:
        try:
            groups = _read_groups(sets, aggregate)
        except ValueError as error:
            raise ValueError(
                f"{error} {measured.hint} returns one number for a batch: each batch is one query, which "
                "takes the place of an example here and has one label."
            ) from error
    return Queries(measured, loaders, groups, are_sets=True)


@dataclass(frozen=True)
class _Sets:
    """The batches of a loader, numbered, in place of examples."""

    indices: Tensor
    size: int | None


def _read_groups(loaders: Sequence[Any], aggregate: Aggregate) -> Groups:
    if isinstance(aggregate, str):
        return join_all(loaders, aggregate)
    return read_groups("aggregate", aggregate, loaders)


def _number(sets: Sequence[_Sets]) -> Groups:
    """Return a group of its own for each batch."""
    names: list[str] = []
    members = []
    for loader, own in enumerate(sets):
        place = f"loader {loader}, " if len(sets) > 1 else ""
        members.append((own.indices, own.indices + len(names)))
        names += [f"{place}batch {number}" for number in own.indices.tolist()]
    return Groups(tuple(names), tuple(members))
