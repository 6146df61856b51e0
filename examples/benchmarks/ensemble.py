"""What averaging over models is worth: linear datamodeling score of one seed and of several averaged.

Run ``python examples/benchmarks/ensemble.py [--models 3] [task ...]``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import torch
from rich.console import Console
from rich.table import Table
from tasks import TASKS, Task
from truth import SIZES, Truth, truth

from lightning_influence import Attributions, InfluenceModule, average_attributions
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.curvature.training_record import LayerRecord, TrainingRecord
from lightning_influence.model.layers.plan import find_layers


def answer(task: Task, seed: int) -> Attributions:
    """Untuned ``auto`` for the model of one seed, factors fitted in a pass.

    Args:
        task: data, net and recipe.
        seed: of the model.

    Returns:
        All scores.
    """
    model = task.trained(seed)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    rate, decay = task.recipe.effective_time(len(task.train)), task.recipe.weight_decay
    layers = {name: LayerRecord(rate, decay) for name in find_layers(model).layers}
    record = TrainingRecord(family="sgd", steps=task.recipe.steps(len(task.train)), layers=layers)
    module = InfluenceModule(model, state=InfluenceState(record=record))
    return module.scores(task.pass_loader(), task.pass_loader(task.queries))


def rows(task: Task, found: Truth, models: int) -> Table:
    """Mean score over all choices of that many models, and their agreement.

    Args:
        task: what the models were trained on.
        found: the ground truth.
        models: how many there are.

    Returns:
        A table.
    """
    parts = [answer(task, seed) for seed in range(models)]
    table = Table("models", "LDS", "95% interval", "agreement", title=f"{task.name}: averages over seeds")
    for count in range(1, models + 1):
        averages = [average_attributions(chosen) for chosen in itertools.combinations(parts, count)]
        scores = [found.lds(average.scores) for average in averages if average.scores is not None]
        mean, low, high = (statistics.mean(row[i] for row in scores) for i in range(3))
        agreement = averages[0].diagnostics.extra["agreement"]
        shown = "" if agreement is None else f"{agreement:.2f}"
        table.add_row(str(count), f"{mean:.3f}", f"{low:.3f} to {high:.3f}", shown)
    return table


def main() -> None:
    """Print a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=sorted(SIZES))
    parser.add_argument("--models", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.tasks:
        task = TASKS[name]()
        Console().print(rows(task, truth(task), arguments.models))


if __name__ == "__main__":
    main()
