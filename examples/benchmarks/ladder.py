"""The ladder of Hessians and its solvers: what each step is worth, and whether untuned ``auto`` holds.

Run ``python examples/benchmarks/ladder.py [--tasks ...] [--sections ...] [--draws M] [--quick] [--fresh]``.
Sections:

- ``scores``: linear datamodeling score (LDS) of every rung and solver over dampings and at ``"auto"``, with
  bootstrap intervals, at every subset fraction, for the loss and the margin, and a plot;
- ``steps``: what each step down the ladder costs, paired over subsets (Hong et al. 2025, "Better Hessians
  Matter", is what this sets out to check);
- ``target``: untuned ``auto`` against the exact Gauss-Newton matrix at its own best damping;
- ``rules``: the exact matrix at the dampings of ``damping_rules.py``;
- ``decomposition``: the same steps as matrices: relative residual, off-block energy, overlaps;
- ``cost``: passes and seconds;
- ``pbrf``: all of them against proximal Bregman responses (Bae et al. 2022);
- ``beyond``: the Hessian in a Krylov subspace, and averages over models of several seeds.

Models, retrainings and answers are kept under ``.cache``; figures go to ``.cache/ladder/results.json`` and
plots beside it. ``--fresh`` answers again: a change of the package does not by itself. ``--quick`` is a smoke
run on a small regression: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ladder_scores
import ladder_tasks
import torch
from ladder_answers import Bench
from ladder_beyond import variants
from ladder_parts import agree, costs, decompose
from ladder_report import (
    agreement_table,
    comparison_table,
    cost_table,
    grid_table,
    multiples_table,
    plain,
    plot,
    rule_table,
    score_table,
    step_table,
    target_table,
    variant_table,
)
from ladder_rules import apply_rules
from ladder_scores import Row, Target, score_steps, score_target, score_task
from ladder_tasks import LADDER, LadderTask
from rich.console import Console

PBRF_DAMPING = {"digits_mlp": 1e-2, "diabetes": 1e-1}
PBRF_EXAMPLES = 8


class Study:
    """One run of the study.

    Args:
        console: where tables go.
        folder: where answers, figures and plots go.
        fresh: whether to compute answers again.
    """

    def __init__(self, console: Console, folder: Path, *, fresh: bool = False) -> None:
        self.console, self.folder, self.fresh = console, folder, fresh
        self.targets: dict[str, list[Target]] = {}
        self._rows: dict[tuple[str, float, str], list[Row]] = {}

    def run(self, entry: LadderTask, sections: list[str]) -> dict[str, Any]:
        """Run sections on a task, print them, and return their figures."""
        bench = Bench(entry, self.folder, fresh=self.fresh)
        return {name: plain(SECTIONS[name](self, bench)) for name in sections}

    def rows(self, bench: Bench, fraction: float, measurement: str) -> list[Row]:
        """Return the scores of a task against one ground truth."""
        key = (bench.entry.name, fraction, measurement)
        if key not in self._rows:
            self._rows[key] = score_task(bench, fraction, measurement)
        return self._rows[key]

    def scores(self, bench: Bench) -> dict[str, list[Row]]:
        """Print LDS of everything."""
        found = {}
        for fraction, measurement in _truths(bench.entry):
            rows = self.rows(bench, fraction, measurement)
            label = f"{bench.entry.name}, {fraction:g} kept, {measurement}"
            self.console.print(score_table(rows, label), grid_table(rows, f"{label}: LDS by damping"))
            picture = self.folder / f"{bench.entry.name}-{fraction:g}-{measurement}.png"
            if not plot(rows, label, picture):
                self.console.print("No plot: install matplotlib.")
            found[f"{fraction:g} {measurement}"] = rows
        return found

    def steps(self, bench: Bench) -> dict[str, Any]:
        """Print what each step costs."""
        found = {}
        for fraction, measurement in _truths(bench.entry):
            steps = score_steps(bench, self.rows(bench, fraction, measurement), fraction, measurement)
            label = f"{bench.entry.name}, {fraction:g} kept, {measurement}: LDS lost by each step"
            self.console.print(step_table(steps, label))
            found[f"{fraction:g} {measurement}"] = steps
        return found

    def target(self, bench: Bench) -> list[Target]:
        """Collect the comparison of ``auto`` with the exact matrix; printed for all tasks at the end."""
        self.targets[bench.entry.name] = [
            score_target(bench, self.rows(bench, fraction, measurement), fraction, measurement)
            for fraction, measurement in _truths(bench.entry)
        ]
        return self.targets[bench.entry.name]

    def rules(self, bench: Bench) -> Any:
        """Print what other damping rules would give."""
        if not bench.entry.dense:
            self.console.print(f"{bench.entry.name}: no dense matrix to try damping rules on.")
            return []
        rows = apply_rules(bench)
        self.console.print(
            rule_table(rows, f"{bench.entry.name}: exact matrix by damping rule, LDS below the best")
        )
        return rows

    def decomposition(self, bench: Bench) -> Any:
        """Print the error of each step as matrices, where there are matrices."""
        if not bench.entry.dense:
            self.console.print(f"{bench.entry.name}: too large for dense matrices, no decomposition.")
            return {}
        found = decompose(bench)
        self.console.print(comparison_table(found, f"{bench.entry.name}: each rung as an approximation"))
        return found

    def cost(self, bench: Bench) -> Any:
        """Print passes and seconds."""
        rows = costs(bench)
        self.console.print(cost_table(rows, f"{bench.entry.name}: what an answer takes"))
        return rows

    def pbrf(self, bench: Bench) -> Any:
        """Print the agreement with proximal Bregman responses."""
        name = bench.entry.name
        if name not in PBRF_DAMPING:
            self.console.print(f"{name}: no proximal responses, they are for the dense tasks.")
            return []
        damping = PBRF_DAMPING[name]
        rows = agree(bench, damping, min(PBRF_EXAMPLES, len(bench.entry.task.train) // 32))
        self.console.print(agreement_table(rows, f"{name}: against PBRF at damping {damping:g}"))
        return rows

    def beyond(self, bench: Bench) -> Any:
        """Print what goes past the exact matrix."""
        if not bench.entry.dense:
            self.console.print(f"{bench.entry.name}: variants are measured on the dense tasks.")
            return []
        rows = variants(bench)
        self.console.print(variant_table(rows, f"{bench.entry.name}: past the Gauss-Newton matrix"))
        return rows


SECTIONS: dict[str, Callable[[Study, Bench], Any]] = {
    "scores": Study.scores,
    "steps": Study.steps,
    "target": Study.target,
    "rules": Study.rules,
    "decomposition": Study.decomposition,
    "cost": Study.cost,
    "pbrf": Study.pbrf,
    "beyond": Study.beyond,
}


def _truths(entry: LadderTask) -> list[tuple[float, str]]:
    return [(fraction, measurement) for measurement in entry.measurements for fraction in entry.fractions]


def quick_task() -> LadderTask:
    """The regression, cut down: 64 examples, 10 queries, 8 subsets, one seed, two epochs."""
    entry = LADDER["diabetes"]()
    recipe = replace(entry.task.recipe, epochs=2)
    tables = entry.task.train.head(64), entry.task.queries.head(10)
    task = replace(entry.task, recipe=recipe, train=tables[0], queries=tables[1])
    return replace(entry, task=task, fractions=(0.5,), subsets=8, seeds=1)


def write(figures: dict[str, Any], path: Path) -> None:
    """Join figures to those of earlier runs on other tasks and sections, atomically."""
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for task, sections in figures.items():
        kept.setdefault(task, {}).update(sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for.

    Args:
        arguments: of the command line; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(LADDER), choices=list(LADDER), metavar="TASK")
    parser.add_argument(
        "--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), metavar="NAME"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--fresh", action="store_true", help="answer again, whatever is cached")
    parser.add_argument("--draws", type=int, default=ladder_scores.DRAWS, help="bootstrap resamples")
    chosen = parser.parse_args(arguments)
    ladder_scores.DRAWS = chosen.draws
    torch.set_num_threads(1)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    folder = ladder_tasks.CACHE / ("ladder-quick" if chosen.quick else "ladder")
    study, figures = Study(console, folder, fresh=chosen.fresh), {}
    entries = [quick_task()] if chosen.quick else [LADDER[name]() for name in chosen.tasks]
    for entry in entries:
        figures[entry.name] = study.run(entry, chosen.sections)
        write({entry.name: figures[entry.name]}, folder / "results.json")
    if study.targets:
        console.print(target_table(study.targets), multiples_table(study.targets))
    console.print(f"Figures: {folder / 'results.json'}")


if __name__ == "__main__":
    main()
