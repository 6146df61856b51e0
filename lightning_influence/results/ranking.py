"""One end of every query's ranking, as a rich table, Markdown and rows, with texts beside the indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_influence.results.rendering import describe_group, markdown_table, render_plain


@dataclass(frozen=True)
class Labels:
    """Texts to show beside dataset indices, such as class names.

    Attributes:
        train: anything indexed by the training dataset's indices: a mapping, a sequence, a tensor of targets.
            An index it does not have gets no text.
        query: the same for queries; with several query dataloaders, a sequence with one of them for each.

    Example:
        >>> Labels(train={3: "cat"}).train_text(3)
        'cat'
    """

    train: Any = None
    query: Any = None

    def train_text(self, index: int) -> str:
        """Returns the text of training example ``index``, or an empty one."""
        return _lookup(self.train, index)

    def query_text(self, index: int, dataloader: int | None = None) -> str:
        """Returns the text of query ``index`` (of query dataloader ``dataloader``), or an empty one."""
        texts = self.query
        if texts is not None and dataloader is not None:
            texts = texts[dataloader]
        return _lookup(texts, index)


def to_labels(labels: Labels | None) -> Labels:
    """Return the labels, or none.

    Raises:
        TypeError: if they are something else.
    """
    if labels is None or isinstance(labels, Labels):
        return labels or Labels()
    raise TypeError(
        f"Got labels of type {type(labels).__name__}; accepted are Labels(train=..., query=...), each "
        "anything that an index finds its text in."
    )


def _lookup(texts: Any, index: int) -> str:
    if texts is None:
        return ""
    try:
        value = texts[index]
    except (KeyError, IndexError):
        return ""
    return str(value.item() if hasattr(value, "item") else value)


Cell: TypeAlias = int | float | str

RANKS_PER_LINE = 5


@dataclass(frozen=True, repr=False, eq=False)
class Ranking(JupyterMixin):
    """The strongest training examples of each query, one end of the ranking.

    It prints as a table, in a terminal, a notebook and with ``rich.print``. The tensors hold every query; the
    table shows the first ``max_queries`` and counts the rest.

    Attributes:
        indices: ``(Q, k)`` training dataset indices, strongest first.
        scores: ``(Q, k)`` their scores, in the measurement's unit.
        query_indices: ``(Q,)`` dataset indices of the queries; None for self-influence (Q = 1).
        query_dataloaders: ``(Q,)`` which query dataloader each is from, when there are several.
        query_names: of the groups of queries that the rows are means over, shown in place of indices and
            labels; empty where rows are single queries.
        query_counts: ``(Q,)`` how many queries each group has.
        train_names: of groups of training examples by index, shown in place of indices and labels.
        title: heading of the table.
        caption: what the scores mean.
        labels: texts for the indices.
        max_queries: how many queries the table shows.
    """

    indices: Tensor
    scores: Tensor
    query_indices: Tensor | None = None
    query_dataloaders: Tensor | None = None
    query_names: Sequence[str] = ()
    query_counts: Tensor | None = None
    train_names: Sequence[str] = ()
    title: str = ""
    caption: str = ""
    labels: Labels = field(default_factory=Labels)
    max_queries: int = 10

    def columns(self) -> list[str]:
        """Names of the columns of :meth:`rows`.

        Returns:
            ``query``, ``queries`` (of groups), ``dataloader``, ``query_label``, ``rank``, ``train``,
            ``train_label`` and ``score``, without those that do not apply.
        """
        query = [] if self.query_indices is None else ["query"]
        loader = [] if self.query_dataloaders is None else ["dataloader"]
        labelled = query and self.labels.query is not None and not self.query_names
        query_label = ["query_label"] if labelled else []
        counts = ["queries"] if self.query_names else []
        train_label = [] if self.labels.train is None or self.train_names else ["train_label"]
        return [*query, *counts, *loader, *query_label, "rank", "train", *train_label, "score"]

    def rows(self, max_queries: int | None = None) -> list[list[Cell]]:
        """The ranking as one row per query and rank.

        Args:
            max_queries: how many queries; all by default.

        Returns:
            The rows, with the cells of :meth:`columns`.
        """
        columns = self.columns()
        rows = []
        for row, (indices, scores) in enumerate(
            zip(self.indices[:max_queries].tolist(), self.scores[:max_queries].tolist(), strict=True)
        ):
            cells = self._query_cells(row)
            for rank, (index, score) in enumerate(zip(indices, scores, strict=True), start=1):
                name, label = self._train_texts(index)
                cells |= {"rank": rank, "train": name, "score": score, "train_label": label}
                rows.append([cells[column] for column in columns])
        return rows

    def markdown(self) -> str:
        """The ranking as a Markdown table of the first ``max_queries`` queries, the rest counted.

        Returns:
            The title, the table and the caption.
        """
        rows = [
            [f"{cell:+.4g}" if isinstance(cell, float) else cell for cell in row]
            for row in self.rows(self.max_queries)
        ]
        parts = [
            f"**{self.title}**" if self.title else "",
            markdown_table(self.columns(), rows),
            self._footnote(),
        ]
        return "\n\n".join(part for part in parts if part)

    def __rich__(self) -> RenderableType:
        table = Table(box=SIMPLE_HEAD)
        k = self.indices.shape[1]
        if self.query_indices is not None:
            table.add_column("query", overflow="fold")
        if k > RANKS_PER_LINE:
            table.add_column("ranks")
        for rank in range(1, min(k, RANKS_PER_LINE) + 1):
            table.add_column(f"#{rank}" if k <= RANKS_PER_LINE else "", justify="right", overflow="fold")
        for row in range(min(len(self.indices), self.max_queries)):
            self._add_lines(table, row)
        # Not the table's own title and caption, which wrap at its width.
        texts = (Text(self.title, style="bold"), table, Text(self._footnote(), style="dim"))
        return Group(*(part for part in texts if part))

    def __repr__(self) -> str:
        return render_plain(self)

    def _add_lines(self, table: Table, row: int) -> None:
        """Adds one query: a line for each RANKS_PER_LINE ranks."""
        entries = [
            Text("\n".join(part for part in (str(name), f"{score:+.3g}", label) if part))
            for index, score in zip(self.indices[row].tolist(), self.scores[row].tolist(), strict=True)
            for name, label in [self._train_texts(index)]
        ]
        for start in range(0, len(entries), RANKS_PER_LINE):
            chunk: list[RenderableType] = [*entries[start : start + RANKS_PER_LINE]]
            if len(entries) > RANKS_PER_LINE:
                chunk.insert(0, f"{start + 1}-{start + len(chunk)}")
            if self.query_indices is not None:
                chunk.insert(0, Text(self._query_text(row) if start == 0 else ""))
            table.add_row(*chunk)

    def _train_texts(self, index: int) -> tuple[int | str, str]:
        """Return what stands for a training example, or for a group of them, and its label."""
        if self.train_names:
            return self.train_names[index], ""
        return index, self.labels.train_text(index)

    def _query_cells(self, row: int) -> dict[str, Cell]:
        if self.query_indices is None:
            return {}
        if self.query_counts is not None:
            return {"query": self.query_names[row], "queries": int(self.query_counts[row])}
        index = int(self.query_indices[row])
        loader = None if self.query_dataloaders is None else int(self.query_dataloaders[row])
        cells: dict[str, Cell] = {"query": index, "query_label": self.labels.query_text(index, loader)}
        return cells if loader is None else cells | {"dataloader": loader}

    def _query_text(self, row: int) -> str:
        cells = self._query_cells(row)
        if "queries" in cells:
            return describe_group(str(cells["query"]), int(cells["queries"]))
        place = f"{cells['dataloader']}: " if "dataloader" in cells else ""
        return f"{place}{cells['query']}" + (f"\n{cells['query_label']}" if cells["query_label"] else "")

    def _footnote(self) -> str:
        hidden = len(self.indices) - self.max_queries
        rest = f"... and {hidden} more queries (max_queries={self.max_queries})." if hidden > 0 else ""
        return "\n".join(part for part in (rest, self.caption) if part)
