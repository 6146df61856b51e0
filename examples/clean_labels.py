"""Cleaning a data set: find wrong labels, look at the most suspect ones, mend or drop them, train again.

A fifth of the training labels of scikit-learn's digits is replaced by another class. The fit keeps each
example's loss and margin, `suspects` ranks the examples, and somebody looks at the first of them: here the
true label is known, so that looking can be played. Plots the accuracy on held-out images against how many
examples were looked at, beside looking at random ones.

    python examples/clean_labels.py [--output docs/images/cleaning.png] [--epochs 30] [--seeds 3]
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from _digits_models import MLP, DigitsData
from _drawing import read_options
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceTrainer

DEFAULT = Path(__file__).parents[1] / "docs" / "images" / "cleaning.png"
FLIPPED = 0.2
TRAINING = 500  # of the 1,617 images; the others measure the accuracy, which on 180 would be too noisy
LOOKED_AT = (0, 50, 100, 150)
WAYS = {"suspects, mended": "tab:blue", "suspects, dropped": "tab:orange", "at random, mended": "tab:gray"}


def train(images: Tensor, labels: Tensor, epochs: int, *, watched: bool = False) -> InfluenceTrainer:
    """Train from the same initialisation, and keep training dynamics if somebody is to watch."""
    seed_everything(0, verbose=False)
    trainer = InfluenceTrainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[InfluenceCallback(dynamics=True)] if watched else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MLP(), DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True))
    return trainer


def measure_accuracy(trainer: InfluenceTrainer, images: Tensor, labels: Tensor) -> float:
    """Share of the held-out images that the trained model gets right."""
    with torch.no_grad():
        found = trainer.lightning_module.eval()(images).argmax(dim=1)
    return float((found == labels).float().mean())


def clean(seed: int, epochs: int, looked_at: tuple[int, ...] = LOOKED_AT) -> dict[str, list[float]]:
    """Flip labels, find them, and train on data cleaned to different lengths.

    Args:
        seed: of the flips and of the random order.
        epochs: of each training.
        looked_at: how many examples somebody looks at.

    Returns:
        By way of cleaning the accuracies; under ``found`` how many wrong labels are among the first suspects,
        and under ``wrong`` how many there are.
    """
    data = DigitsData(flipped=FLIPPED, seed=seed)
    images, given = (tensor[:TRAINING] for tensor in data.train_set.tensors)
    true, is_flipped = DigitsData().train_set.tensors[1], data.is_flipped[:TRAINING]
    held_out = (data.train_set.tensors[0][TRAINING:], true[TRAINING:])
    watched = train(images, given, epochs, watched=True)
    suspects = watched.suspects()
    ranked = suspects.top(TRAINING).indices[0]
    shuffled = torch.randperm(TRAINING, generator=torch.Generator().manual_seed(seed))
    base = measure_accuracy(watched, *held_out)
    result: dict[str, list[float]] = {way: [] for way in WAYS}
    for count in looked_at:
        for way, found in result.items():
            seen = (shuffled if "random" in way else ranked)[:count]
            labels, kept = given.clone(), torch.ones(TRAINING, dtype=torch.bool)
            if "dropped" in way:
                kept[seen[is_flipped[seen]]] = False
            else:
                labels[seen] = true[seen]
            changed = not kept.all() or not torch.equal(labels, given)
            again = train(images[kept], labels[kept], epochs) if changed else watched
            found.append(measure_accuracy(again, *held_out) if changed else base)
    found_so_far = [float(is_flipped[ranked[:count]].sum()) for count in looked_at]
    return {**result, "found": found_so_far, "wrong": [float(is_flipped.sum())]}


def draw(runs: list[dict[str, list[float]]], looked_at: tuple[int, ...] = LOOKED_AT) -> Figure:
    """Draw the mean accuracies of several runs, each with its standard error, and what was found."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    accuracy, found = figure.subplots(1, 2)
    for way, colour in WAYS.items():
        means = [100 * statistics.fmean(values) for values in zip(*(run[way] for run in runs), strict=True)]
        errors = [
            100 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            for values in zip(*(run[way] for run in runs), strict=True)
        ]
        accuracy.errorbar(looked_at, means, errors, fmt=".-", capsize=3, color=colour, label=way)
    accuracy.set(xlabel="training examples looked at", ylabel="held-out accuracy (%)")
    accuracy.legend(fontsize=8)
    wrong = statistics.fmean(run["wrong"][0] for run in runs)
    mean_found = [statistics.fmean(values) for values in zip(*(run["found"] for run in runs), strict=True)]
    found.plot(looked_at, mean_found, ".-", color="tab:blue", label="suspects")
    at_random = [wrong * count / TRAINING for count in looked_at]
    found.plot(looked_at, at_random, "-", color="tab:gray", label="at random (expected)")
    found.axhline(wrong, linestyle=":", color="black", linewidth=1)
    found.set(xlabel="training examples looked at", ylabel=f"wrong labels found (of {wrong:.0f})")
    found.legend(fontsize=8)
    for axes in (accuracy, found):
        axes.grid(alpha=0.3)
    return figure


def main(arguments: list[str] | None = None) -> list[dict[str, list[float]]]:
    """Clean, draw and print."""
    options = read_options(__doc__, DEFAULT, arguments, epochs=30, seeds=3)
    runs = [clean(seed, options.epochs) for seed in range(options.seeds)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs).savefig(options.output, dpi=90)
    print(f"{'looked at':>20} " + " ".join(f"{count:>6}" for count in LOOKED_AT))
    for name in (*WAYS, "found"):
        means = [statistics.fmean(values) for values in zip(*(run[name] for run in runs), strict=True)]
        texts = (f"{mean:6.1f}" if name == "found" else f"{mean:6.1%}" for mean in means)
        print(f"{name:>20} " + " ".join(texts))
    print(f"wrote {options.output}")
    return runs


if __name__ == "__main__":
    main()
