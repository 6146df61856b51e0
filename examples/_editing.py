"""What the three editing examples share: training, the table of methods, metrics, pictures and logs."""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _digits_models import Batch, Classifier, DigitsData
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.edits.rules import rule_names
from lightning_influence.results.rendering import markdown_table
from lightning_influence.support.errors import InfluenceWarning

RATIOS = (0.02, 0.05, 0.10, 0.30)
METRICS = ("accuracy", "accuracy_kept", "loss", "loss_kept", "kl", "seconds")
console = Console()


class DigitsCNN(Classifier):
    """Two convolutions and two linear layers, smooth throughout: 38,282 parameters, all of them covered."""

    def __init__(self) -> None:
        super().__init__()
        first = (nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.AvgPool2d(2))
        second = (nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.Flatten())
        self.net = nn.Sequential(*first, *second, nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 10))


@dataclass
class Task:
    """What is edited in one example.

    Attributes:
        name: of the task, for files and logs.
        edited: what the edited group of test images is called.
        kept: what the other group is called.
        train: the training data as they were, ``(images, labels)``.
        retrain: the data that the edit should be equivalent to training on.
        edit: computes an edit: ``(module, loader, options) -> ParameterEdit``.
        groups: test images and labels of the edited and of the kept group.
        options: of every edit.
    """

    name: str
    edited: str
    kept: str
    train: Batch
    retrain: Batch
    edit: Callable[[InfluenceModule, DataLoader[Batch], dict[str, Any]], ParameterEdit]
    groups: tuple[Batch, Batch]
    options: dict[str, Any] = field(default_factory=dict)


def digits(count: int | None) -> tuple[Batch, Batch]:
    """The first ``count`` training images and the test images of scikit-learn's digits, with their labels."""
    data = DigitsData()
    (train, labels), (test, answers) = data.train_set.tensors, data.test_set.tensors
    return (train[:count], labels[:count]), (test, answers)


def fit(data: Batch, seed: int, epochs: int) -> DigitsCNN:
    """Train from scratch in the ordinary way."""
    seed_everything(seed, verbose=False)
    model = DigitsCNN()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(*data), batch_size=32, shuffle=True))
    return model.eval()


@torch.no_grad()
def measure(model: nn.Module, task: Task, reference: nn.Module) -> dict[str, float]:
    """Accuracy and loss on both groups, and KL divergence from the retrained model's predictions."""
    found, divergences = {}, []
    for suffix, (images, labels) in zip(("", "_kept"), task.groups, strict=True):
        logits = model(images)
        found[f"accuracy{suffix}"] = 100 * float((logits.argmax(1) == labels).float().mean())
        found[f"loss{suffix}"] = float(nn.functional.cross_entropy(logits, labels))
        log_q, log_p = (out.log_softmax(1) for out in (logits, reference(images)))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(1))
    found["kl"] = float(torch.cat(divergences).mean())
    return found


def edits(
    rules: list[str], ratios: tuple[float, ...], *, removal: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of every row of the table with its options."""
    yield "IF", {"method": "if"}
    if removal:
        yield "second-order IF", {"method": "second_order"}
    for ratio in ratios:
        for method in ("pif", "fif"):
            yield f"{method.upper()} {ratio:.0%} gain", {"method": method, "ratio": ratio}
        for rule in rules:
            yield f"GIF {ratio:.0%} {rule}", {"rule": rule, "ratio": ratio}


def cpu(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the CPU seconds it took, which other processes do not change."""
    start = time.process_time()
    return function(), time.process_time() - start


Rows = dict[str, list[dict[str, float]]]


def run_seed(task: Task, seed: int, options: argparse.Namespace, rows: Rows) -> dict[str, DigitsCNN]:
    """Train, retrain and edit with one seed; the measurements are added to the rows."""
    (model, _), (reference, seconds) = (
        cpu(lambda data=data: fit(data, seed, options.epochs)) for data in (task.train, task.retrain)
    )

    def add(name: str, subject: nn.Module, cost: float) -> None:
        rows.setdefault(name, []).append({**measure(subject, task, reference), "seconds": cost})

    add("original", model, 0.0)
    shown = {"original": model}
    loader: DataLoader[Batch] = DataLoader(TensorDataset(*task.train), batch_size=512)
    wanted = list(edits(options.rules, options.ratios, removal=task.name == "forget_class"))
    for name, own in track(wanted, f"seed {seed}", console=console, transient=True):
        asked = {**task.options, **own, "seed": seed}
        edit, cost = cpu(lambda asked=asked: task.edit(InfluenceModule(model), loader, asked))
        with edit:
            add(name, model, cost)
            if name == f"GIF {options.shown:.0%} gain":
                copy = DigitsCNN().eval()
                copy.load_state_dict(model.state_dict())
                shown[name] = copy
        if name == f"GIF {options.shown:.0%} gain" and seed == 0:
            console.print(edit)
    add("retrained", reference, seconds)
    return {**shown, "retrained": reference}


def cell(values: list[float], digits: int) -> str:
    """Return the mean over the seeds, and its standard error if there are several."""
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return text
    return f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def cells(rows: Rows) -> list[list[str]]:
    """Return the table as texts: a row for each model."""
    cost = statistics.fmean(row["seconds"] for row in rows["retrained"])
    result = []
    for name, measured in rows.items():
        columns = {metric: [row[metric] for row in measured] for metric in METRICS}
        texts = [cell(columns[metric], 1 if "accuracy" in metric else 2) for metric in METRICS]
        result.append([name, *texts, f"{100 * statistics.fmean(columns['seconds']) / cost:.0f}%"])
    return result


def headings(task: Task) -> list[str]:
    """Return the names of the columns."""
    pair = (task.edited, task.kept)
    return ["model", *(f"% {g}" for g in pair), *(f"loss {g}" for g in pair), "KL", "CPU s", "cost"]


def confusion(models: dict[str, DigitsCNN], groups: tuple[Batch, Batch]) -> Figure:
    """Draw each model's confusion matrix over the test images of both groups."""
    figure = Figure(figsize=(4 * len(models), 4), layout="constrained")
    images, labels = (torch.cat(pair) for pair in zip(*groups, strict=True))
    for axes, (name, model) in zip(figure.subplots(1, len(models)), models.items(), strict=True):
        with torch.no_grad():
            counts = torch.bincount(10 * labels + model(images).argmax(1), minlength=100).view(10, 10)
        axes.imshow(counts.numpy(), cmap="Blues")
        for row, column in counts.nonzero().tolist():
            axes.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=7)
        axes.set(title=name, xlabel="predicted", ylabel="label", xticks=range(10), yticks=range(10))
    return figure


def report(task: Task, rows: Rows, figure: Figure, output: Path, seeds: int) -> None:
    """Print the table, save the picture, and log everything to TensorBoard."""
    lines = cells(rows)
    caption = (
        f"Mean over {seeds} seed(s), ± standard error. %: accuracy on test images. KL: from the retrained "
        "model's predictions. cost: share of retraining's CPU time."
    )
    table = Table(title=task.name, caption=caption, padding=(0, 0), title_justify="left")
    for heading in headings(task):
        left = heading == "model"
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    for line in lines:
        table.add_row(*line, style="bold" if line[0] in {"original", "retrained"} else "")
    console.print(table)
    path = output / f"{task.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    logger = TensorBoardLogger(output / "tensorboard", task.name)
    for name, measured in rows.items():
        for seed, metrics in enumerate(measured):
            logger.log_metrics(
                {f"{name.replace(' ', '_')}/{key}": v for key, v in metrics.items()}, step=seed
            )
    logger.experiment.add_text("table", markdown_table(headings(task), lines))
    logger.experiment.add_figure("confusion", figure)
    logger.finalize("success")
    console.print(f"wrote {path}; tensorboard --logdir {output / 'tensorboard'}", soft_wrap=True)


def main(
    make: Callable[[int, int | None], Task],
    description: str,
    rules: list[str],
    arguments: list[str] | None = None,
) -> Rows:
    """Run an example.

    Args:
        make: makes the task for a seed, from so many training images.
        description: of the script.
        rules: the selection rules to compare unless the user names others.
        arguments: of the command line.

    Returns:
        The measurements by row of the table.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many models to train and edit")
    parser.add_argument("--rules", nargs="+", default=rules, choices=rule_names(), help="selection rules")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="shares of the parameters")
    parser.add_argument("--output", type=Path, default=Path("runs/editing"), help="folder for files and logs")
    parser.add_argument("--quick", action="store_true", help="few images, one rule: to see that it runs")
    options = parser.parse_args(arguments)
    options.epochs, options.ratios = 30, tuple(options.ratios)
    if options.quick:
        options.epochs, options.rules, options.ratios = 10, ["gain"], (0.05,)
    options.shown = 0.05 if 0.05 in options.ratios else options.ratios[0]
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # Lightning 2.6 on torch 2.13
    # The controls among the rules cost much on purpose: the table shows by how much.
    warnings.filterwarnings("ignore", category=InfluenceWarning)
    rows: Rows = {}
    figure = None
    for seed in range(options.seeds):
        task = make(seed, 400 if options.quick else None)
        if options.quick and task.name == "repair_backdoor":
            task.options["linearisations"] = 2
        models = run_seed(task, seed, options, rows)
        figure = figure or confusion(models, task.groups)
    assert figure is not None
    report(task, rows, figure, options.output, options.seeds)
    return rows
