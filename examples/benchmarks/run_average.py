"""What averaging over checkpoints of one run is worth: LDS of single checkpoints and of their averages.

Run ``python examples/benchmarks/run_average.py [task ...] [--seeds S] [--draws M] [--small]``. Each
checkpoint is answered by untuned ``auto`` as ``trainer.influence(..., ckpt_path=[...])`` would answer it:
with the record that the callback had by then, so that earlier checkpoints have more damping. Differences are
to the last checkpoint alone, under one resampling of the subsets. As a control, the last row averages as
many answers for the last checkpoint that differ only in the solver's seed (labels of the factors, anchors).
``ensemble.py`` does the same for seeds of the run.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Sequence

import ladder_scores
import torch
from ladder_scores import interval, paired
from ladder_tasks import LADDER, LadderTask
from rich.console import Console
from rich.table import Table
from snapshots import Snapshot, snapshots
from unrolling_study import small_task

from lightning_influence import Attributions, InfluenceModule, average_attributions
from lightning_influence.curvature.state import InfluenceState

SHARES = (0.4, 0.7, 1.0)


def answer(entry: LadderTask, snapshot: Snapshot, seed: int = 0) -> Attributions:
    """Untuned ``auto`` for one checkpoint, factors fitted in a pass; ``seed`` is the solver's."""
    task, state = entry.task, InfluenceState(record=snapshot.record)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = InfluenceModule(snapshot.module, state=state)
        return module.scores(task.pass_loader(), task.pass_loader(task.queries), seed=seed)


def rows(entry: LadderTask, epochs: Sequence[int], seed: int = 0) -> Table:
    """Score every set of checkpoints that holds the last, and every checkpoint alone.

    Args:
        entry: the task.
        epochs: of the checkpoints; the last one is what differences are to.
        seed: of the run.

    Returns:
        A table.
    """
    truth = entry.truth(0.5, "loss")
    run = snapshots(entry.task, epochs, seed)
    parts = {one.epoch: answer(entry, one) for one in run}
    repeats = [parts[epochs[-1]], *(answer(entry, run[-1], number) for number in range(1, len(run)))]
    last = repeats[0].scores
    assert last is not None
    table = Table(
        "epochs",
        "damping",
        "LDS",
        "above the last",
        "agreement",
        title=f"{entry.name}, seed {seed}: averages over checkpoints of one run",
        caption="loss, half kept; 95% intervals over subsets",
    )
    chosen = [(epoch,) for epoch in epochs]
    for count in range(2, len(epochs) + 1):
        chosen += [some for some in itertools.combinations(epochs, count) if epochs[-1] in some]
    named = {", ".join(map(str, some)): [parts[epoch] for epoch in some] for some in chosen}
    named[f"{epochs[-1]}, {len(repeats)} solver seeds"] = repeats
    for name, some_parts in named.items():
        average = average_attributions(some_parts)
        assert average.scores is not None
        damping = average.diagnostics.damping.values()
        agreement = average.diagnostics.extra["agreement"]
        table.add_row(
            name,
            f"{sum(damping) / len(damping):.2e}",
            str(interval(average.scores, truth)),
            str(paired(average.scores, last, truth)),
            "" if agreement is None else f"{agreement:.2f}",
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each task.

    Args:
        arguments: of the command line; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["diabetes", "digits_mlp", "digits_cnn"])
    parser.add_argument("--seeds", type=int, default=1, help="runs, a table each")
    parser.add_argument("--draws", type=int, default=300, help="bootstrap resamples")
    parser.add_argument("--small", action="store_true", help="a smoke run, whose figures mean nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ladder_scores.DRAWS = options.draws
    console = Console()
    if not console.is_terminal:
        console.width = 110
    for entry in [small_task()] if options.small else [LADDER[name]() for name in options.tasks]:
        epochs = [round(share * entry.task.recipe.epochs) for share in SHARES]
        for seed in range(options.seeds):
            console.print(rows(entry, epochs, seed))


if __name__ == "__main__":
    main()
