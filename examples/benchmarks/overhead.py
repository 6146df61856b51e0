"""What :class:`InfluenceCallback` costs a fit: the same fit with and without it, in turn.

``python examples/benchmarks/overhead.py [--small] [--rounds 3] [task ...]``. CPU seconds on one thread; the
best of several rounds on either side, because a neighbour on the machine only ever slows a fit. The spread
between the rounds of one side is shown beside: an overhead below it is not resolved. What passes in the hooks
is, whatever the neighbours do: its share of the rest of a fit that is timed there alone, the median of the
rounds. Training dynamics are part of it, which may take a tenth of a second in short fits.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, replace

import torch
from hook_clock import measure_shares
from rich.console import Console
from rich.table import Table
from tasks import TASKS, Task, fit

from lightning_influence import InfluenceCallback

DEFAULT = ("large_mlp", "digits_mlp", "digits_cnn")
SMALL_EPOCHS = 2


@dataclass(frozen=True)
class Overhead:
    """CPU seconds of every round of one task, and what the callback collected.

    Attributes:
        task: its name.
        steps: optimizer steps of a fit.
        plain: fits without the callback.
        collecting: fits with it.
        hooks: share of the rest of such fits that the callback's hooks took.
        dynamics: share of it that training dynamics took in these.
        batches: batches that one fit collected.
        complete: whether factors with eigenvalues were there at the end.
    """

    task: str
    steps: int
    plain: tuple[float, ...]
    collecting: tuple[float, ...]
    hooks: tuple[float, ...]
    dynamics: tuple[float, ...]
    batches: int
    complete: bool

    @property
    def share(self) -> float:
        """Best with the callback over best without, less 1."""
        return min(self.collecting) / min(self.plain) - 1

    @property
    def spread(self) -> float | None:
        """Larger of the two sides' relative distance between the best and second-best round; None for one."""
        sides = [sorted(side) for side in (self.plain, self.collecting) if len(side) > 1]
        return max((side[1] / side[0] - 1 for side in sides), default=None)


def cpu_seconds(task: Task, callbacks: list[InfluenceCallback]) -> float:
    """CPU seconds of one fit, from the same seed every time."""
    gc.collect()
    start = time.process_time()
    fit(task, 0, callbacks=list(callbacks))
    return time.process_time() - start


def overhead(task: Task, rounds: int) -> Overhead:
    """Fit a task ``rounds`` times without and with the callback, in turn.

    Args:
        task: what to fit; its recipe decides for how long.
        rounds: fits of each kind.

    Returns:
        The times.
    """
    fit(replace(task, recipe=replace(task.recipe, epochs=1)), 0, callbacks=[InfluenceCallback()])  # warm-up
    plain, collecting, shares = [], [], []
    callback = InfluenceCallback()
    for _ in range(rounds):
        plain.append(cpu_seconds(task, []))
        callback = InfluenceCallback()
        collecting.append(cpu_seconds(task, [callback]))
        shares.append(measure_shares(lambda clocked: cpu_seconds(task, [clocked])))
    steps = task.recipe.steps(len(task.train))
    collected, complete = callback.num_collected, callback.factors.has_squares
    hooks, dynamics = zip(*shares, strict=True)
    return Overhead(task.name, steps, tuple(plain), tuple(collecting), hooks, dynamics, collected, complete)


def render(results: list[Overhead], console: Console | None = None) -> None:
    """Print a table of results, to the terminal by default."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 120
    rounds = len(results[0].plain)
    table = Table(
        title="What collecting costs a fit",
        caption=f"CPU seconds on one thread, best of {rounds} rounds; spread: best to second-best round",
    )
    table.add_column("task")
    columns = (
        "steps", "plain", "with callback", "overhead", "spread", "in hooks", "of it dynamics", "batches",
        "factors",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.task,
            str(result.steps),
            f"{min(result.plain):.2f}",
            f"{min(result.collecting):.2f}",
            f"{100 * result.share:+.1f} %",
            "-" if result.spread is None else f"{100 * result.spread:.1f} %",
            f"{100 * statistics.median(result.hooks):.1f} %",
            f"{100 * statistics.median(result.dynamics):.1f} %",
            str(result.batches),
            "complete" if result.complete else "covariances only",
        )
    console.print(table)


def main() -> None:
    """Measure the chosen tasks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(DEFAULT), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--rounds", type=int, default=3, help="fits of each kind")
    parser.add_argument("--small", action="store_true", help=f"one round of {SMALL_EPOCHS} epochs")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    unknown = sorted(set(arguments.tasks) - set(TASKS))
    if unknown:
        parser.error(f"unknown tasks {unknown}; choose of {', '.join(TASKS)}")
    torch.set_num_threads(1)
    results = []
    for name in arguments.tasks:
        task = TASKS[name]()
        if arguments.small:
            task = replace(task, recipe=replace(task.recipe, epochs=SMALL_EPOCHS))
        results.append(overhead(task, 1 if arguments.small else arguments.rounds))
    render(results)


if __name__ == "__main__":
    main()
