"""Attributions in the Trainer's loggers: metrics in all of them, tables and pictures where a logger has them.

A logger class gets its own way of showing tables and pictures with ``@log_media.register``; others get the
metrics, and there are the files on disk.
"""

from __future__ import annotations

import csv
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_influence.results.attributions import Attributions
from lightning_influence.results.dynamics import TrainingDynamics
from lightning_influence.results.ranking import Cell, Labels, Ranking
from lightning_influence.results.rendering import markdown_table
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.results.suspects import Suspects
from lightning_influence.support.errors import InfluenceWarning
from lightning_influence.support.storage import PathLike, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What :func:`log_attributions` takes.
Loggable: TypeAlias = Attributions | SelfInfluence | TrainingDynamics | Suspects

TABLE_RANKS = 5
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Chosen by hand: 64 MiB of float32, and an error of the quantile's level of about 1e-4.
_QUANTILE_SCORES = 2**24


@dataclass(frozen=True)
class Media:
    """What a logger may show beside metrics.

    Attributes:
        name: prefix of all keys.
        step: the Trainer's global step.
        rankings: tables of training examples, by key.
        facts: names and values of the diagnostics.
        figures: pictures by key.
        files: what was written to disk.
    """

    name: str
    step: int
    rankings: Mapping[str, Ranking]
    facts: Sequence[tuple[str, str]] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    files: Sequence[Path] = ()

    def tables(self) -> dict[str, tuple[list[str], list[list[Cell]]]]:
        """Names of the columns, and rows, of the rankings and of the diagnostics.

        Returns:
            Both by key; the diagnostics are last.
        """
        tables = {key: (ranking.columns(), ranking.rows()) for key, ranking in self.rankings.items()}
        return {**tables, "diagnostics": (["name", "value"], [list(fact) for fact in self.facts])}


def log_attributions(
    loggers: Iterable[Any],
    attributions: Loggable,
    *,
    step: int,
    name: str = "influence",
    directory: PathLike | None = None,
    figures: Mapping[str, Figure] | None = None,
    labels: Labels | None = None,
) -> list[Path]:
    """Log attributions to loggers and files, on the process of rank zero.

    A logger or a file that fails is named in an :class:`InfluenceWarning`; the others still get theirs.

    Args:
        loggers: Lightning loggers; none is fine.
        attributions: what to log.
        step: the Trainer's global step.
        name: prefix of all keys.
        directory: where to write the attributions (safetensors, unless the scores have a file), the ends of
            the rankings (CSV) and the figures (PNG); existing files of the same names are replaced. None
            writes nothing.
        figures: matplotlib figures by name.
        labels: texts to show beside the indices.

    Returns:
        The files written.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        return []
    figures = figures or {}
    k = min(TABLE_RANKS, attributions.stored)
    rankings = {
        "top": attributions.top(k, labels=labels),
        "bottom": attributions.bottom(k, labels=labels),
    }
    files = (
        []
        if directory is None
        else _write_files(Path(directory).expanduser(), attributions, rankings, figures)
    )
    media = Media(name, step, rankings, attributions.diagnostics.facts(), figures, files)
    metrics = {f"{name}/{key}": value for key, value in summary_metrics(attributions).items()}
    for logger in loggers:
        who = f"{type(logger).__name__} could not log the attributions'"
        _attempt(f"{who} metrics", partial(logger.log_metrics, metrics, step=step))
        _attempt(f"{who} tables and figures", partial(log_media, logger, media))
    return files


class Report(Protocol):
    """What is told of something that was done."""

    def facts(self) -> Iterable[tuple[str, str]]:
        """Names and values to show as a table."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Numbers by key."""
        ...


class Reported(Protocol):
    """Something with a report and a file, such as a ``ParameterEdit``."""

    @property
    def report(self) -> Report:
        """The report."""
        ...

    def save(self, path: PathLike) -> Any:
        """Write the file."""
        ...


def log_edit(
    loggers: Iterable[Any],
    edit: Reported,
    *,
    step: int,
    name: str = "edit",
    directory: PathLike | None = None,
) -> list[Path]:
    """Log an edit's report to loggers, and the edit to a file, on the process of rank zero.

    A logger or a file that fails is named in an :class:`InfluenceWarning`; the others still get theirs.

    Args:
        loggers: Lightning loggers; none is fine.
        edit: what to log.
        step: the Trainer's global step.
        name: prefix of all keys, and name of the file's folder.
        directory: where to write the folder; None writes nothing.

    Returns:
        The files written.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        return []
    files: list[Path] = []
    if directory is not None:
        path = Path(directory).expanduser() / name / "edit.safetensors"
        files = [path] if _attempt(f"{path} could not be written", partial(edit.save, path)) else []
    media = Media(name, step, {}, list(edit.report.facts()), files=files)
    metrics = {f"{name}/{key}": value for key, value in edit.report.metrics().items()}
    for logger in loggers:
        who = f"{type(logger).__name__} could not log the edit's"
        _attempt(f"{who} metrics", partial(logger.log_metrics, metrics, step=step))
        _attempt(f"{who} report", partial(log_media, logger, media))
    return files


def summary_metrics(attributions: Loggable) -> dict[str, float]:
    """Numbers that sum up attributions.

    Args:
        attributions: what to sum up.

    Returns:
        Counts, seconds (in all and per pass), mean damping, covered share of the parameters, mean and highest
        residual where there are residuals, and the extremes of the scores, with quantiles if all are stored.
    """
    facts = attributions.diagnostics
    metrics = {
        "train_examples": float(len(attributions.train_indices)),
        "seconds": facts.seconds,
        "parameters_covered": facts.parameters_covered,
    }
    if isinstance(attributions, Attributions):
        metrics["queries"] = float(len(attributions.query_indices))
        for name, kind in (("queries", "query"), ("train_examples", "train")):
            counts = getattr(attributions, f"{kind}_counts")
            if counts is not None:
                metrics |= {name: float(counts.sum()), f"{kind}_groups": float(len(counts))}
    for done in facts.passes:
        key = f"seconds_{name_pass(done['name'])}"
        metrics[key] = metrics.get(key, 0.0) + done["seconds"]
    if facts.damping:
        metrics["damping_mean"] = sum(facts.damping.values()) / len(facts.damping)
    if facts.residuals is not None and facts.residuals.numel():
        metrics["residual_mean"] = float(facts.residuals.mean())
        metrics["residual_max"] = float(facts.residuals.max())
    return metrics | _score_metrics(attributions)


def name_pass(description: str) -> str:
    """Return what a pass is called in logs: its words, as a logger may refuse colons and spaces.

    Example:
        >>> name_pass("Influence: query gradients")
        'query_gradients'
    """
    return "_".join(re.findall(r"[0-9a-z]+", description.lower().removeprefix("influence:")))


def _score_metrics(attributions: Loggable) -> dict[str, float]:
    highest, lowest = attributions.top(1).scores, attributions.bottom(1).scores
    metrics = {"score_max": float(highest.max()), "score_min": float(lowest.min())}
    if attributions.scores is not None:
        metrics |= _quantiles(attributions.scores)
    return metrics


def _quantiles(scores: Tensor) -> dict[str, float]:
    # Of more than 16 million scores an even share, because quantiles sort a copy of what they are taken of.
    # The stride has no divisor in common with the row's length, so that every column comes by.
    stride = -(-scores.numel() // _QUANTILE_SCORES)
    while math.gcd(stride, scores.shape[-1]) > 1 and stride > 1:
        stride += 1
    # numpy, because torch.quantile takes 16 million numbers at most, and twice the memory.
    values = np.quantile(scores.flatten()[::stride].numpy(), QUANTILES)
    return {f"score_q{int(100 * q):02d}": float(value) for q, value in zip(QUANTILES, values, strict=True)}


def _attempt(what: str, action: Callable[[], Any]) -> bool:
    """Returns whether the action succeeded; warns if it did not."""
    try:
        action()
    except Exception as error:
        warnings.warn(f"{what}: {type(error).__name__}: {error}", InfluenceWarning, stacklevel=3)
        return False
    return True


def _write_files(
    directory: Path,
    attributions: Loggable,
    rankings: Mapping[str, Ranking],
    figures: Mapping[str, Figure],
) -> list[Path]:
    stem = attributions.KIND.replace("-", "_")
    writers: dict[str, Callable[[Path], Any]] = {f"{stem}.csv": partial(_write_csv, rankings=rankings)}
    if "scores_file" not in attributions.diagnostics.extra:  # a copy may not fit onto the disk
        writers = {f"{stem}.safetensors": attributions.save, **writers}
    for key, figure in figures.items():
        writers[f"{key.replace('/', '_')}.png"] = partial(_write_png, figure=figure)
    return [
        directory / file
        for file, write in writers.items()
        if _attempt(f"{directory / file} could not be written", partial(write, directory / file))
    ]


def _write_csv(path: Path, rankings: Mapping[str, Ranking]) -> None:
    with write_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for number, (end, ranking) in enumerate(rankings.items()):
            if number == 0:
                writer.writerow(["end", *ranking.columns()])
            writer.writerows([end, *row] for row in ranking.rows())


def _write_png(path: Path, figure: Figure) -> None:
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png")


@singledispatch
def log_media(logger: Any, media: Media) -> None:
    """Show tables and pictures in a logger; nothing for a logger class without its own way.

    Register one with ``@log_media.register(MyLogger)`` on a function of the same arguments. What it raises
    becomes a warning. Loggers of ``pytorch_lightning`` are served like those of the same names here.

    Args:
        logger: the logger.
        media: what to show.
    """
    for kind in type(logger).__mro__:
        if kind.__module__.startswith("pytorch_lightning.loggers."):
            twin = getattr(lightning_loggers, kind.__name__, object)
            if twin in log_media.registry and twin is not object:
                log_media.registry[twin](logger, media)
                return


@log_media.register(CSVLogger)
def _(logger: CSVLogger, media: Media) -> None:
    # Rows wait in memory until the logger is told to write, and no fit follows that would.
    logger.save()


@log_media.register(TensorBoardLogger)
def _(logger: TensorBoardLogger, media: Media) -> None:
    writer = logger.experiment
    for key, ranking in media.rankings.items():
        writer.add_text(f"{media.name}/{key}", ranking.markdown(), media.step)
    writer.add_text(f"{media.name}/diagnostics", markdown_table(["name", "value"], media.facts), media.step)
    for key, figure in media.figures.items():
        writer.add_figure(f"{media.name}/{key}", figure, media.step, close=False)
    writer.flush()


@log_media.register(WandbLogger)
def _(logger: WandbLogger, media: Media) -> None:
    from lightning_influence.results.plots import figure_to_array

    for key, (columns, rows) in media.tables().items():
        logger.log_table(f"{media.name}/{key}", columns, rows, step=media.step)
    for key, figure in media.figures.items():
        logger.log_image(f"{media.name}/{key}", [figure_to_array(figure)], step=media.step)


@log_media.register(MLFlowLogger)
def _(logger: MLFlowLogger, media: Media) -> None:
    client, run, folder = logger.experiment, logger.run_id, f"{media.name}/step_{media.step}"
    for key, (columns, rows) in media.tables().items():
        table = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
        client.log_table(run, table, f"{folder}/{key}.json")
        # The call above makes MLflow show a table, adds its rows to those of an earlier answer, and keeps ten
        # digits after the point, of which small scores have few.
        client.log_dict(run, {"columns": columns, "data": rows}, f"{folder}/{key}.json")
    for key, figure in media.figures.items():
        client.log_figure(run, figure, f"{folder}/{key}.png")
    for file in media.files:
        client.log_artifact(run, str(file), folder)


@log_media.register(CometLogger)
def _(logger: CometLogger, media: Media) -> None:
    experiment = logger.experiment
    for key, (columns, rows) in media.tables().items():
        experiment.log_table(f"{media.name}/{key}_{media.step}.csv", rows, columns)
    for key, figure in media.figures.items():
        experiment.log_figure(f"{media.name}/{key}", figure, step=media.step)
    for file in media.files:
        experiment.log_asset(str(file), f"{media.name}/{file.name}", step=media.step)
