"""The folder that a command writes: the result's own file, a table, the page, and the configuration."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.results.attributions import Attributions
from lightning_influence.results.loggers import Loggable
from lightning_influence.results.suspects import Suspects
from lightning_influence.support.storage import write_atomically

PAGE = "report.html"


def write_result(folder: Path, result: Loggable, k: int | None, **page: Any) -> None:
    """Write a result's file and table, and its page where Jinja2 is installed; files that exist are replaced.

    Args:
        folder: is made if there is none.
        result: what to write.
        k: how many examples at the ends of rankings the page and the table of attributions show; None for
            the page's own default, or as many as there are.
        **page: what the result's ``report`` takes beside.
    """
    k = choose_k(result, k)
    result.top(k)  # refuses a k that is too large before anything is written
    stem = result.KIND.replace("-", "_").replace(" ", "_")
    result.save(folder / f"{stem}.safetensors")
    _write_csv(folder / f"{stem}.csv", _list_rows(result, k))
    if can_write_pages():
        result.report(folder / PAGE, k=k, **page)


def write_edit(folder: Path, edit: ParameterEdit, examples: Sequence[int], **page: Any) -> None:
    """Write an edit's file, its figures and its page.

    Args:
        folder: is made if there is none.
        edit: the edit.
        examples: dataset indices of the edited examples.
        **page: what the edit's ``report`` takes beside.
    """
    edit.save(folder / "edit.safetensors")
    _write_csv(folder / "edit.csv", [["name", "value"], *edit.report.metrics().items()])
    if can_write_pages():
        edit.report(folder / PAGE, examples=examples, **page)


def can_write_pages() -> bool:
    """Whether Jinja2, which pages are made with, is installed."""
    return importlib.util.find_spec("jinja2") is not None


def choose_k(result: Loggable, k: int | None) -> int:
    """Return how many examples a page shows: as many as asked for, or its default where there are so many."""
    default: int = inspect.signature(result.report).parameters["k"].default
    return min(default, result.stored) if k is None else k


def _list_rows(result: Loggable, k: int) -> Iterator[Sequence[Any]]:
    """Rows of a table: both ends of each query's ranking, or every example with all that is known of it."""
    if isinstance(result, Attributions):
        for number, (end, ranking) in enumerate((("top", result.top(k)), ("bottom", result.bottom(k)))):
            if number == 0:
                yield ["end", *ranking.columns()]
            yield from ([end, *row] for row in ranking.rows())
        return
    columns = _list_columns(result)
    order = result.top(result.stored).indices[0]
    rows = result.find_rows(order)
    reasons = [[]] if not isinstance(result, Suspects) else [["; ".join(r)] for r in result.reasons(order)]
    yield ["train", *columns, *(["reasons"] if isinstance(result, Suspects) else [])]
    values = [order.tolist(), *(column[rows].tolist() for column in columns.values())]
    for row, *cells in zip(range(len(order)), *values, strict=True):
        yield [*cells, *reasons[row % len(reasons)]]


def _list_columns(result: Loggable) -> dict[str, Tensor]:
    fields = ((field.name, getattr(result, field.name)) for field in dataclasses.fields(result))
    return {
        name.replace("scores", "score"): value
        for name, value in fields
        if isinstance(value, Tensor) and name != "train_indices"
    }


def _write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    with write_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
