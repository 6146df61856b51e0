"""What an influence query returns: scores of training examples, and the certificate of how they came about.

A score is the predicted change of a query's measurement when a training example is removed, in the
measurement's unit: ``tau(q, n) = (1/N) g_q^T (H + lambda I)^{-1} g_n``. With the loss as the measurement, a
positive score means that the training example helps the query (a proponent), a negative one that it hurts (an
opponent).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from rich.console import Group, RenderableType
from torch import Tensor
from typing_extensions import Self

from lightning_influence.results.ranking import Labels, Ranking, to_labels
from lightning_influence.results.rendering import build_facts_table, score_caption
from lightning_influence.results.report import charts
from lightning_influence.results.report.certificate import describe_certificate
from lightning_influence.results.report.page import read_options, write_page
from lightning_influence.results.report.sections import build_queries
from lightning_influence.results.result import Result, import_pandas
from lightning_influence.results.top_k import Extremes, check_finite, select_topk
from lightning_influence.support.arguments import are_distinct, check_k, check_shape, list_some, read_indices
from lightning_influence.support.errors import NonFiniteError
from lightning_influence.support.storage import PathLike

if TYPE_CHECKING:
    import pandas as pd

# Chosen by hand: scores of a group that are copied at once.
_COPIED = 2**22


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Attributions(Result):
    """Scores of training examples for queries: all of them, or the strongest at either end.

    A score is the predicted change of the query's measurement when the training example is removed, in the
    measurement's unit; for the loss, positive means that the example helps the query. A group's predicted
    effect is the sum of its members' scores. All tensors are on the CPU, half-precision scores in float32.

    Attributes:
        train_indices: ``(N,)`` distinct training dataset indices, the columns of ``scores``.
        query_indices: ``(Q,)`` query dataset indices.
        diagnostics: how the scores were computed.
        query_dataloaders: ``(Q,)`` which query dataloader each query is from, when there are several.
        query_names: names of the groups of queries that the rows are means over, ``Q`` of them; empty where
            rows are single queries. ``query_indices`` then number the groups.
        query_counts: ``(Q,)`` how many queries each group has.
        train_names: names of the groups of training examples whose scores the columns are sums of, ``N`` of
            them; empty where columns are single examples. ``train_indices`` then number the groups.
        train_counts: ``(N,)`` how many training examples each group has.
        scores: ``(Q, N)`` all scores, or None when only both ends were kept.
        layer_scores: ``(L, Q, N)`` what each layer, or block of layers, adds to the scores, or None if that
            was not asked.
        layer_names: names of these layers or blocks.
        position_scores: ``(T + 1, Q, N)`` what each position of a training example's sequence adds to the
            scores, zero where the example is shorter, and in the last row what layers add whose gradients
            are of no position; None if that was not asked.
        top_scores: ``(Q, k)`` the highest scores, descending.
        top_indices: ``(Q, k)`` their training dataset indices.
        bottom_scores: ``(Q, k)`` the lowest scores, ascending.
        bottom_indices: ``(Q, k)`` their training dataset indices.

    Raises:
        ValueError: if shapes or dtypes do not fit, or both or neither of ``scores`` and the ends are given.
        NonFiniteError: if a score is NaN or infinite.

    Example:
        >>> import torch
        >>> from lightning_influence import Diagnostics
        >>> attributions = Attributions(
        ...     scores=torch.tensor([[0.1, -0.2, 0.3]]),
        ...     train_indices=torch.tensor([10, 11, 12]),
        ...     query_indices=torch.tensor([4]),
        ...     diagnostics=Diagnostics(method="ekfac"),
        ... )
        >>> attributions.top(2).indices
        tensor([[12, 10]])
        >>> attributions.group([10, 12])
        tensor([0.4000])
    """

    KIND: ClassVar[str] = "attributions"

    query_indices: Tensor
    query_dataloaders: Tensor | None = None
    query_names: Sequence[str] = ()
    query_counts: Tensor | None = None
    train_names: Sequence[str] = ()
    train_counts: Tensor | None = None
    layer_scores: Tensor | None = None
    layer_names: Sequence[str] = ()
    position_scores: Tensor | None = None
    scores: Tensor | None = None
    top_scores: Tensor | None = None
    top_indices: Tensor | None = None
    bottom_scores: Tensor | None = None
    bottom_indices: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Q, N = len(self.query_indices) if self.query_indices.ndim else 1, len(self.train_indices)
        ends = [self.top_scores, self.top_indices, self.bottom_scores, self.bottom_indices]
        if sum(end is not None for end in ends) != (4 if self.scores is None else 0):
            raise ValueError(
                "give either scores, or top and bottom scores and indices; got both, neither or a part"
            )
        check_shape("query_indices", self.query_indices, (max(Q, 1),))
        check_shape("query_dataloaders", self.query_dataloaders, (Q,))
        for kind, size, holder in (
            ("query", Q, self.query_counts),
            ("train", N, self.train_counts),
            ("layer", len(self.layer_names), self.layer_scores),
        ):
            names = tuple(getattr(self, f"{kind}_names"))
            object.__setattr__(self, f"{kind}_names", names)
            if (len(names) != size and names) or bool(names) != (holder is not None):
                raise ValueError(f"{kind}_names must be {size}, one for each, or none; got {len(names)}")
        check_shape("query_counts", self.query_counts, (Q,))
        check_shape("train_counts", self.train_counts, (N,))
        check_shape("layer_scores", self.layer_scores, (len(self.layer_names), Q, N))
        positions = 0 if self.position_scores is None else len(self.position_scores)
        check_shape("position_scores", self.position_scores, (positions, Q, N))
        check_shape("diagnostics.residuals", self.diagnostics.residuals, (Q,))
        if self.scores is not None:
            check_shape("scores", self.scores, (Q, N))
            check_finite(self.scores, self.train_indices)
        if self.top_scores is not None and self.bottom_scores is not None:
            self._check_ends(Q, self.top_scores, self.bottom_scores)

    def _check_ends(self, Q: int, top: Tensor, bottom: Tensor) -> None:
        k = max(1, top.shape[-1] if top.dim() else 1)
        for name in ("top_scores", "top_indices", "bottom_scores", "bottom_indices"):
            check_shape(name, getattr(self, name), (Q, k))
        for name, scores in (("top", top), ("bottom", -bottom)):
            indices = getattr(self, f"{name}_indices")
            if not bool(torch.isfinite(scores).all()):
                raise NonFiniteError(
                    f"{name}_scores hold NaN or infinity; look at the losses and at the damping"
                )
            if bool((scores.diff(dim=1) > 0).any()):
                raise ValueError(f"{name}_scores must be sorted, the strongest first")
            if not bool(torch.isin(indices, self.train_indices).all()):
                raise ValueError(f"{name}_indices hold examples that train_indices does not")

    @classmethod
    def from_extremes(cls, extremes: Extremes, **others: Any) -> Self:
        """Attributions from the result of a :class:`~.results.streaming.StreamingExtremes`.

        Args:
            extremes: both ends of the rankings, and what was ranked.
            **others: ``query_indices``, ``diagnostics`` and, with several loaders, ``query_dataloaders``.

        Returns:
            The attributions.
        """
        return cls(
            train_indices=extremes.train_indices,
            top_scores=extremes.top.scores,
            top_indices=extremes.top.indices,
            bottom_scores=extremes.bottom.scores,
            bottom_indices=extremes.bottom.indices,
            **others,
        )

    @property
    def stored(self) -> int:
        """How many examples per query :meth:`top` and :meth:`bottom` can return."""
        return len(self.train_indices) if self.top_scores is None else self.top_scores.shape[1]

    def top(self, k: int = 5, *, labels: Labels | None = None, max_queries: int = 10) -> Ranking:
        """The highest scores of each query: with the loss measured, its strongest proponents.

        Args:
            k: how many.
            labels: texts to show beside the indices.
            max_queries: how many queries the printed table shows; the rest is counted.

        Returns:
            Indices ``(Q, k)`` and scores ``(Q, k)`` that print as a table.

        Raises:
            ValueError: if fewer than ``k`` are stored, or ``max_queries`` is below 1.
        """
        return self._ranking(k, True, labels, max_queries)

    def bottom(self, k: int = 5, *, labels: Labels | None = None, max_queries: int = 10) -> Ranking:
        """The lowest scores of each query: with the loss measured, its strongest opponents.

        Args:
            k: how many.
            labels: texts to show beside the indices.
            max_queries: how many queries the printed table shows; the rest is counted.

        Returns:
            Indices ``(Q, k)`` and scores ``(Q, k)``, the lowest first, that print as a table.

        Raises:
            ValueError: if fewer than ``k`` are stored, or ``max_queries`` is below 1.
        """
        return self._ranking(k, False, labels, max_queries)

    def _ranking(self, k: int, largest: bool, labels: Labels | None, max_queries: int) -> Ranking:
        how = "all scores are stored" if self.top_scores is None else f"top_k={self.stored}"
        check_k(k, self.stored, how)
        if max_queries < 1:
            raise ValueError(f"Got max_queries={max_queries}; accepted are integers of at least 1.")
        if self.scores is not None:
            scores, indices = select_topk(self.scores, self.train_indices, k, largest=largest)
        else:
            end = "top" if largest else "bottom"
            scores, indices = getattr(self, f"{end}_scores")[:, :k], getattr(self, f"{end}_indices")[:, :k]
        return Ranking(
            indices=indices,
            scores=scores,
            query_indices=self.query_indices,
            query_dataloaders=self.query_dataloaders,
            query_names=self.query_names,
            query_counts=self.query_counts,
            train_names=self.train_names,
            title=_title(self.diagnostics.measurement, largest),
            caption=score_caption(self.diagnostics.measurement),
            labels=to_labels(labels),
            max_queries=max_queries,
        )

    def for_query(self, index: int | str, dataloader: int | None = None) -> Self:
        """The attributions of one query.

        Args:
            index: its dataset index, or the name of a group of queries.
            dataloader: its query dataloader, to tell queries of several apart.

        Returns:
            Attributions of the rows with this index: one, or several if it was queried more than once.

        Raises:
            ValueError: if it was not queried.
        """
        if isinstance(index, str):
            if index not in self.query_names:
                known = ", ".join(self.query_names[:10]) or "none: rows are single queries"
                raise ValueError(f"there is no group of queries {index!r}; query_names are {known}")
            index = int(self.query_indices[self.query_names.index(index)])
        rows = self.query_indices == index
        if dataloader is not None:
            loaders = self.query_dataloaders
            rows &= (torch.zeros_like(self.query_indices) if loaders is None else loaders) == dataloader
        if not bool(rows.any()):
            where = "" if dataloader is None else f" of dataloader {dataloader}"
            known = list_some(self.query_indices)
            raise ValueError(f"query {index}{where} was not asked for; query_indices are {known}")
        per_query: dict[str, Any] = {
            name: t[:, rows] if name in ("layer_scores", "position_scores") else t[rows]
            for name, t in self._tensors().items()
            if not name.startswith("train_")
        }
        residuals = self.diagnostics.residuals
        diagnostics = dataclasses.replace(
            self.diagnostics, residuals=None if residuals is None else residuals[rows.to(residuals.device)]
        )
        names = [name for name, kept in zip(self.query_names, rows.tolist(), strict=False) if kept]
        return dataclasses.replace(self, diagnostics=diagnostics, query_names=names, **per_query)

    def for_layer(self, name: str) -> Self:
        """One layer's or block's part of the scores, as attributions of its own; all parts add up.

        Args:
            name: one of :attr:`layer_names`.

        Returns:
            Attributions with this part as scores.

        Raises:
            ValueError: if there is no such part.
        """
        if self.layer_scores is None or name not in self.layer_names:
            known = ", ".join(self.layer_names) or "none: ask with by='layer' or by='block'"
            raise ValueError(f"there are no scores of layer {name!r}; layer_names are {known}")
        part = self.layer_scores[self.layer_names.index(name)]
        return dataclasses.replace(self, scores=part, layer_scores=None, layer_names=())

    def group(self, train_indices: Tensor | Sequence[int]) -> Tensor:
        """Predicted change of each query's measurement when a group of training examples is removed.

        Args:
            train_indices: the group's distinct dataset indices, or a boolean mask ``(N,)`` over
                :attr:`train_indices`.

        Returns:
            ``(Q,)``, the sum of the members' scores, in the measurement's unit.

        Raises:
            ValueError: if only the ends of the rankings are stored, an example is unknown or repeated, or the
                group is neither indices nor a mask.
        """
        if self.scores is None:
            raise ValueError(
                f"a group needs all scores, but only {self.stored} at either end are stored: omit top_k"
            )
        wanted = read_indices(train_indices, self.train_indices)
        unknown = wanted[~torch.isin(wanted, self.train_indices)]
        if len(unknown) or not are_distinct(wanted):
            what = f"unknown examples: {list_some(unknown)}" if len(unknown) else "an example twice"
            raise ValueError(f"the group holds {what}; it takes distinct members of train_indices")
        members = torch.isin(self.train_indices, wanted)
        rows = max(1, _COPIED // max(1, len(wanted)))
        return torch.cat([part[:, members].sum(1) for part in torch.split(self.scores, rows)])

    def to_pandas(self) -> pd.DataFrame:
        """The scores as a pandas DataFrame in long form, one row per query and training example.

        Returns:
            Columns ``query``, ``dataloader`` (with several), ``train`` and ``score``, with names in place of
            indices of groups; when only the ends are stored also ``end`` (``top`` or ``bottom``) and ``rank``
            (from 1).

        Raises:
            ImportError: if pandas is not installed.
        """
        pandas = import_pandas()
        if self.scores is not None:
            return pandas.DataFrame(self._columns(self.train_indices.expand(self.scores.shape), self.scores))
        frames = []
        for end, ranking in (("top", self.top(self.stored)), ("bottom", self.bottom(self.stored))):
            frame = pandas.DataFrame(self._columns(ranking.indices, ranking.scores))
            frame["end"] = end
            frame["rank"] = torch.arange(1, self.stored + 1).repeat(len(self.query_indices)).numpy()
            frames.append(frame)
        return pandas.concat(frames, ignore_index=True)

    def report(
        self, path: PathLike, dataset: Any = None, query_dataset: Any = None, *, k: int = 5, **options: Any
    ) -> Path:
        """Write a page that opens in any browser, without a network, for people to look through.

        It shows each query with its prediction and with the training examples at either end of its ranking,
        how the scores are distributed, and the certificate in plain words. The page's address with
        ``#query-4`` (``#query-1-4`` of the second query dataloader) or ``#train-27`` leads to one example.

        Args:
            path: the file, used as it stands; an existing one is replaced.
            dataset: the training examples: anything indexed by training dataset indices. Without one, indices
                and scores are shown.
            query_dataset: the same for queries; with several query dataloaders, a list with one for each.
            k: how many training examples at either end.
            **options: further fields of :class:`~lightning_influence.results.report.ReportOptions`:
                ``labels``, ``class_names``, ``predictions``, ``render``, ``title``, ``spectrum``,
                ``megabytes``.

        Returns:
            The path.

        Raises:
            ValueError: if fewer than ``k`` are stored, or a dataset has no entry of an index.
            TypeError: if an option is unknown or of a wrong type.
            ImportError: if Jinja2 is not installed.
        """
        material = read_options({"dataset": dataset, "query_dataset": query_dataset, **options})
        queries, facts = len(self.query_indices), self.diagnostics
        top, bottom = (end(k, max_queries=max(1, queries)) for end in (self.top, self.bottom))
        scores = self.scores if self.top_scores is None else torch.cat([top.scores, bottom.scores], 1)
        which = "of all training examples" if self.top_scores is None else "at either end of the rankings"
        drawn = charts.build_charts([
            charts.histogram(
                f"Scores {which}",
                f"predicted change of the {facts.measurement} on removal",
                scores,
                "Most examples hardly matter to a given query; the few far from 0 do.",
            ),
            charts.residual_chart(facts),
            charts.damping_chart(facts),
            *charts.spectrum_charts(material.options.spectrum),
        ])
        lead = (
            f"Which of {len(self.train_indices):,} training examples made the model do what it did on "
            f"{queries:,} {'query' if queries == 1 else 'queries'}?"
        )
        for name, names in (("query_dataset", self.query_names), ("dataset", self.train_names)):
            if names and getattr(material.options, name) is not None:
                raise ValueError(f"Got {name}, but scores are of groups, which are no items of it; omit it.")
        cards = build_queries(material, top, bottom, facts.measurement, facts.residuals)
        sections = [cards, describe_certificate(facts), drawn]
        return write_page(path, material, "What the model learned this from", lead, sections)

    def _columns(self, indices: Tensor, scores: Tensor) -> dict[str, Any]:
        width = scores.shape[1]
        names = [name for name in self.query_names for _ in range(width)]
        columns: dict[str, Any] = {"query": names or self.query_indices.repeat_interleave(width).numpy()}
        if self.query_dataloaders is not None:
            columns["dataloader"] = self.query_dataloaders.repeat_interleave(width).numpy()
        groups = [self.train_names[index] for index in indices.flatten().tolist() if self.train_names]
        return columns | {"train": groups or indices.flatten().numpy(), "score": scores.flatten().numpy()}

    def __rich__(self) -> RenderableType:
        kept = "all scores" if self.scores is not None else f"the {self.stored} strongest at either end"
        queries, examples = str(len(self.query_indices)), str(len(self.train_indices))
        if self.query_counts is not None and int(self.query_counts.max()) > 1:
            queries = f"{int(self.query_counts.sum())} in {queries} groups, a row for the mean of each"
        if self.train_counts is not None:
            examples = f"{int(self.train_counts.sum())} in {examples} groups, a column for the sum of each"
        counts = [("queries", queries), ("training examples", examples), ("stored", kept)]
        facts = [*counts, *self.diagnostics.facts()]
        return Group(build_facts_table(facts, "Attributions"), self.top(min(5, self.stored)))

    def __repr__(self) -> str:
        kept = "full" if self.scores is not None else f"top_k={self.stored}"
        rows, columns = (" groups" if names else "" for names in (self.query_names, self.train_names))
        return (
            f"Attributions(Q={len(self.query_indices)}{rows}, N={len(self.train_indices)}{columns}, {kept}, "
            f"method={self.diagnostics.method!r}, measurement={self.diagnostics.measurement!r})"
        )


def _title(measurement: str, largest: bool) -> str:
    if measurement == "loss":
        return "Strongest proponents" if largest else "Strongest opponents"
    return "Highest scores" if largest else "Lowest scores"
