"""Which gradients Kronecker factors should be made of: linear datamodeling score of the kinds of Fisher.

One draw of either random kind costs one backward pass. Run ``python examples/benchmarks/fisher.py [--seeds 5]
[--small] [task ...]``.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rich.console import Console
from rich.table import Table
from tasks import TASKS, Task, TaskModule
from truth import SIZES, Truth, truth

from lightning_influence import InfluenceModule
from lightning_influence.passes.captured import RANDOM, Fisher

METHODS = "kfac", "ekfac"
KINDS: tuple[Fisher, ...] = ("exact", "mixed", "sampled", "empirical")


def scored(task: Task, model: TaskModule, found: Truth, fisher: Fisher, method: str, seed: int) -> float:
    """Return the score of one way to fit the factors, at the method's default damping.

    Args:
        task: data and batches.
        model: the trained module.
        found: the ground truth.
        fisher: what the factors are made of.
        method: ``"kfac"`` or ``"ekfac"``.
        seed: of the draws.
    """
    answer = InfluenceModule(model).scores(
        task.pass_loader(), task.pass_loader(task.queries), method=method, fisher=fisher, seed=seed
    )
    assert answer.scores is not None
    return found.lds(answer.scores, bootstrap=2)[0]


def table(task: Task, found: Truth, seeds: int) -> Table:
    """Mean, least and greatest score over seeds of the draws.

    Args:
        task: data and recipe.
        found: its ground truth.
        seeds: how many draws of the random kinds.
    """
    model = task.trained()
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    result = Table("fisher", *METHODS, title=f"{task.name}: LDS, mean over draws (least to greatest)")
    for fisher in KINDS:
        cells = []
        for method in METHODS:
            count = seeds if fisher in RANDOM else 1
            values = [scored(task, model, found, fisher, method, seed) for seed in range(count)]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if count > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        result.add_row(fisher, *cells)
    return result


def main() -> None:
    """Print a table a task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the random kinds")
    parser.add_argument("--small", action="store_true", help="10 subsets, one seed of retraining")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.tasks:
        task = TASKS[name]()
        Console().print(table(task, truth(task, small=arguments.small), arguments.seeds))


if __name__ == "__main__":
    main()
