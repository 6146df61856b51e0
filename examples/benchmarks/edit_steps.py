"""What an edit's method does without a search for the step: every method at multiples of the theoretical one.

``python examples/benchmarks/edit_steps.py [--seeds 5]`` edits the digits CNN of ``examples/`` in one shot,
once to forget a class and once to change labels, and prints the accuracy on edited and on other test images,
the mean over the seeds. ``--quick`` trains one model on few images: to see that it runs.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _editing
import change_labels
import forget_class

from lightning_influence import InfluenceModule
from lightning_influence.support.errors import InfluenceWarning

METHODS = ("if", "pif", "fif", "gif")
MULTIPLES = {
    "forget_class": (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0),
    "change_labels": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
}

Found = dict[tuple[str, float], list[tuple[float, float]]]


def accuracies(task: _editing.Task, seed: int, epochs: int, found: Found) -> tuple[float, float]:
    """Edit one seed's model at every step; return accuracies of the model before, edited group first."""
    model = _editing.fit(task.train, seed, epochs)
    loader = DataLoader(TensorDataset(*task.train), batch_size=512)
    for method in METHODS:
        for multiple in MULTIPLES[task.name]:
            options = {"method": method, "step": multiple, "linearisations": 1, "seed": seed}
            with task.edit(InfluenceModule(model), loader, options):
                found.setdefault((method, multiple), []).append(right(model, task))
    return right(model, task)


@torch.no_grad()
def right(model: torch.nn.Module, task: _editing.Task) -> tuple[float, float]:
    """Percent of the edited and of the other test images that are predicted as their labels say."""
    values = [
        100 * float((model(images).argmax(1) == labels).float().mean()) for images, labels in task.groups
    ]
    return values[0], values[1]


def table(task: _editing.Task, found: Found, before: list[tuple[float, float]]) -> Table:
    """The means over the seeds: a row a method, a column a multiple."""
    edited, kept = (statistics.fmean(values) for values in zip(*before, strict=True))
    result = Table(
        title=f"{task.name}: % {task.edited} / % {task.kept} (before: {edited:.1f} / {kept:.1f})",
        caption="Columns: multiples of the theoretical step.",
    )
    result.add_column("method")
    for multiple in MULTIPLES[task.name]:
        result.add_column(f"{multiple:g}", justify="right")
    for method in METHODS:
        pairs = [
            tuple(map(statistics.fmean, zip(*found[method, multiple], strict=True)))
            for multiple in MULTIPLES[task.name]
        ]
        result.add_row(method, *(f"{pair[0]:.1f} / {pair[1]:.1f}" for pair in pairs))
    return result


def main(arguments: list[str] | None = None) -> None:
    """Edit, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    seeds, count, epochs = (1, 400, 40) if options.quick else (options.seeds, None, 30)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", category=InfluenceWarning)
    for make in (forget_class.make, change_labels.make):
        found: Found = {}
        before = []
        for seed in track(range(seeds), "seeds", transient=True):
            task = make(seed, count)
            before.append(accuracies(task, seed, epochs, found))
        Console(width=140).print(table(task, found, before))


if __name__ == "__main__":
    main()
