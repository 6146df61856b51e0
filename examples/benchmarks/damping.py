"""Damping study: the score of ``damping="auto"`` against a grid, for the exact Gauss-Newton matrix.

Run ``python examples/benchmarks/damping.py [task ...] [--models K]``. Retrainings, models and spectra are
cached. The best grid value is chosen on the same truth that it is scored on, so it is an optimistic bound.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from spectra import Spectrum, recorded, spectrum
from studies import STUDIES, Study
from tasks import TaskModule
from torch import Tensor

from lightning_influence import InfluenceModule
from lightning_influence.curvature.damping import resolve_damping
from lightning_influence.evaluation.lds import linear_datamodeling_score, predict_subsets
from lightning_influence.model.layers.plan import Layout, find_layers

GRID = [10 ** (power / 2) for power in range(-10, 3)]
BOOTSTRAP = 200


@dataclass(frozen=True)
class Row:
    """One trained model: ``auto``'s mean damping and score with interval, and the best of the grid."""

    task: str
    auto: float
    auto_score: float
    best: float
    best_score: float
    interval: tuple[float, float]


def auto_damping(study: Study, model: TaskModule, seed: int) -> Tensor:
    """What ``damping="auto"`` resolves to for a full solver, one value a parameter, ``(P,)``.

    Args:
        study: the task.
        model: its trained model.
        seed: the model's.

    Returns:
        The damping.
    """
    module = InfluenceModule(model)
    module.fit_factors(study.task.pass_loader())
    assert module.state.factors is not None
    values, _ = resolve_damping("auto", module.state.factors, recorded(study.task, seed)[1], solver="full")
    return Layout.of(find_layers(model).layers).expand(values, torch.zeros((), dtype=torch.float64))


def score_of(scores: Tensor, truth: tuple[Tensor, Tensor]) -> float:
    """Linear datamodeling score of ``scores (Q, N)``."""
    masks, losses = truth
    return float(linear_datamodeling_score(predict_subsets(scores, masks), losses.double())[0])


def scores_at(found: Spectrum, damping: Tensor) -> Tensor:
    """Scores at a damping of one value a parameter, by the cheap route where all are equal."""
    same = bool((damping == damping[0]).all())
    return found.scores(float(damping[0]) if same else damping)


def study_row(name: str, seed: int) -> Row:
    """Score the grid and ``auto`` for one trained model.

    Args:
        name: of ``STUDIES``.
        seed: of the model.

    Returns:
        The figures.
    """
    study = STUDIES[name]()
    truth, found = study.truth(), spectrum(study.task, seed)
    damping = auto_damping(study, recorded(study.task, seed)[0], seed)
    scores = scores_at(found, damping)
    predicted = predict_subsets(scores, truth[0])
    value, interval = linear_datamodeling_score(predicted, truth[1].double(), bootstrap=BOOTSTRAP)
    assert interval is not None
    grid = [score_of(found.scores(each), truth) for each in GRID]
    best = max(range(len(GRID)), key=lambda i: grid[i])
    ends = (float(interval[0]), float(interval[1]))
    return Row(name, float(damping.mean()), float(value), GRID[best], grid[best], ends)


def render(rows: list[Row]) -> Table:
    """The table of all tasks."""
    table = Table(title="Exact Gauss-Newton scores: damping='auto' against the best of a grid")
    for column in ("task", "auto", "LDS at auto", "95% interval", "best of grid", "LDS", "gap"):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=column == "task")
    for row in rows:
        ends = f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        gap = row.best_score - row.auto_score
        cells = (f"{row.auto:.2e}", f"{row.auto_score:.3f}", ends, f"{row.best:.1e}", f"{row.best_score:.3f}")
        table.add_row(row.task, *cells, f"{gap:+.3f}")
    return table


def main() -> None:
    """Compute what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(STUDIES), help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--models", type=int, default=1, help="trained models a task, seeds 0 to K - 1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, console = [], Console()
    for name in arguments.tasks:
        start = time.process_time()
        rows += [study_row(name, seed) for seed in range(arguments.models)]
        console.print(f"{name}: {time.process_time() - start:.0f} CPU seconds")
    console.print(render(rows))


if __name__ == "__main__":
    main()
