"""Which gradients Kronecker factors should be made of: linear datamodeling score of the kinds of Fisher.

Factors are fitted in a pass at the final weights, or collected by the callback during the fit. One draw
of either random kind costs one backward pass. Run ``python examples/benchmarks/fisher.py [--seeds 3]
[--small] [task ...]``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from tasks import TASKS, Task, TaskModule, fit
from truth import SIZES, Truth, truth

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.collecting.checks import FitFisher
from lightning_influence.model.captured import RANDOM, Fisher

METHODS = "kfac", "ekfac"


def scores(task: Task, module: InfluenceModule, found: Truth, **how: Any) -> float:
    """Return the score of one answer.

    Args:
        task: data and batches.
        module: around the trained model.
        found: the ground truth.
        **how: method and Fisher, at the method's default damping.
    """
    answer = module.scores(task.pass_loader(), task.pass_loader(task.queries), **how)
    assert answer.scores is not None
    return found.lds(answer.scores, bootstrap=2)[0]


def muted(model: TaskModule) -> TaskModule:
    """Return the model without its logging, which needs a Trainer."""
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model


def from_a_pass(task: Task, found: Truth, fisher: Fisher, seeds: int) -> Iterator[list[float]]:
    """Score factors from a pass.

    Args:
        task: data and recipe.
        found: its ground truth.
        fisher: what the factors are made of.
        seeds: how many draws.

    Yields:
        The scores of each method over the draws.
    """
    model = muted(task.trained())
    for method in METHODS:
        yield [
            scores(task, InfluenceModule(model), found, method=method, fisher=fisher, seed=seed)
            for seed in range(seeds)
        ]


def from_the_fit(task: Task, found: Truth, fisher: FitFisher, seeds: int) -> Iterator[list[float]]:
    """Score factors that the callback collects while the model of the truth is trained.

    Args:
        task: data and recipe.
        found: its ground truth.
        fisher: what the factors are made of.
        seeds: how many fits, equal but for the draws.

    Yields:
        The scores of each method over the draws.
    """
    modules = []
    for seed in range(seeds):
        callback = InfluenceCallback(fisher=fisher, seed=seed, log_statistics=False)
        model = muted(fit(task, 0, [callback]).eval())
        modules.append(InfluenceModule(model, factors=callback.factors))
    for method in METHODS:
        yield [scores(task, module, found, method=method) for module in modules]


def table(task: Task, found: Truth, seeds: int) -> Table:
    """Mean, least and greatest score over draws.

    Args:
        task: data and recipe.
        found: its ground truth.
        seeds: how many draws of the random kinds.
    """
    result = Table("factors", "fisher", *METHODS, title=f"{task.name}: LDS, mean (least to greatest)")
    for fisher in get_args(Fisher):
        columns = from_a_pass(task, found, fisher, seeds if fisher in RANDOM else 1)
        result.add_row("a pass", fisher, *map(cell, columns))
    for fisher in get_args(FitFisher):
        result.add_row("the fit", fisher, *map(cell, from_the_fit(task, found, fisher, seeds)))
    return result


def cell(values: list[float]) -> str:
    """Return the mean of some scores, and their range."""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    """Print a table a task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the random kinds")
    parser.add_argument("--small", action="store_true", help="10 subsets, one seed of retraining")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.tasks:
        task = TASKS[name]()
        Console().print(table(task, truth(task, small=arguments.small), arguments.seeds))


if __name__ == "__main__":
    main()
