"""Choosing data for a target slice: which source of training data should be kept, which should go?

The training data are scikit-learn's digits as four sources deliver them: one is clean, one turns its images
upside down, one adds noise, and one labels a third of its images wrongly. The target is a slice of the
held-out data: nines and sixes. One question with `aggregate="mean"` and `train_groups=` answers it: a row for
the slice's mean loss, a column for each source. Every source is then left out in turn, and the predictions
are compared with what the slice's loss does.

    python examples/choose_data.py [--output docs/images/sources.png] [--epochs 20] [--seeds 4]
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from _digits_models import MLP, DigitsData
from _drawing import read_options
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributions, InfluenceCallback, InfluenceTrainer

DEFAULT = Path(__file__).parents[1] / "docs" / "images" / "sources.png"
SOURCES = ("clean", "upside down", "noisy", "careless labels")
TARGET = (6, 9)
TRAINING = 600  # images, 150 from each source; others measure the target's loss


def deliver(seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Training images, their labels, and the name of each one's source."""
    images, labels = (tensor[:TRAINING].clone() for tensor in DigitsData().train_set.tensors)
    source = torch.arange(TRAINING) % len(SOURCES)
    generator = torch.Generator().manual_seed(seed)
    images[source == 1] = images[source == 1].flip(2, 3)
    images[source == 2] += 0.5 * torch.randn(images[source == 2].shape, generator=generator)
    careless = (source == 3) & (torch.rand(TRAINING, generator=generator) < 1 / 3)
    labels[careless] = (
        labels[careless] + torch.randint(1, 10, (TRAINING,), generator=generator)[careless]
    ) % 10
    return images, labels, [SOURCES[index] for index in source]


def find_target() -> tuple[Tensor, Tensor]:
    """Held-out images of the slice, and their labels."""
    images, labels = (tensor[TRAINING:] for tensor in DigitsData().train_set.tensors)
    chosen = torch.isin(labels, torch.tensor(TARGET))
    return images[chosen], labels[chosen]


def train(images: Tensor, labels: Tensor, epochs: int, *callbacks: InfluenceCallback) -> InfluenceTrainer:
    """Train from the same initialisation."""
    seed_everything(0, verbose=False)
    trainer = InfluenceTrainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MLP(), DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True))
    return trainer


def measure_loss(trainer: InfluenceTrainer) -> float:
    """The trained model's mean loss on the target slice."""
    images, labels = find_target()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(trainer.lightning_module.eval()(images), labels))


def predict(images: Tensor, labels: Tensor, sources: list[str], epochs: int) -> tuple[Attributions, float]:
    """Train on all sources, and ask what the slice's loss would be without each.

    Returns:
        The answer, one row (the slice) by four columns (the sources), and the slice's loss.
    """
    trainer = train(images, labels, epochs, InfluenceCallback())
    queries = DataLoader(TensorDataset(*find_target()), batch_size=64)
    answer = trainer.influence(query_dataloaders=queries, aggregate="mean", train_groups=sources)
    return answer, measure_loss(trainer)


def compare(seed: int, epochs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Predict what happens to the slice's loss without each source, and measure it by training again.

    Args:
        seed: of the noise and of the wrong labels.
        epochs: of each training.

    Returns:
        The predicted and the measured changes of the loss by source.
    """
    images, labels, sources = deliver(seed)
    answer, loss = predict(images, labels, sources, epochs)
    predicted = dict(zip(answer.train_names, answer.scores[0].tolist(), strict=True))
    measured = {}
    for name in SOURCES:
        kept = torch.tensor([source != name for source in sources])
        measured[name] = measure_loss(train(images[kept], labels[kept], epochs)) - loss
    return predicted, measured


def draw(predicted: dict[str, list[float]], measured: dict[str, list[float]]) -> Figure:
    """Draw both changes side by side, means over the seeds with every seed as a dot."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for offset, (label, changes, colour) in enumerate((
        ("predicted by one question", predicted, "tab:blue"),
        ("measured by training without it", measured, "tab:gray"),
    )):
        places = [place + 0.4 * offset - 0.2 for place in range(len(SOURCES))]
        means = [statistics.fmean(changes[name]) for name in SOURCES]
        axes.bar(places, means, width=0.36, color=colour, label=label, alpha=0.8)
        for place, name in zip(places, SOURCES, strict=True):
            axes.plot([place] * len(changes[name]), changes[name], ".", color="black", markersize=4)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(SOURCES)), SOURCES)
    axes.set_ylabel("change of the slice's loss\nwithout the source")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="y")
    return figure


def main(arguments: list[str] | None = None) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Compare, draw and print."""
    options = read_options(__doc__, DEFAULT, arguments, epochs=20, seeds=4)
    runs = [compare(seed, options.epochs) for seed in range(options.seeds)]
    predicted, measured = ({name: [run[part][name] for run in runs] for name in SOURCES} for part in (0, 1))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(predicted, measured).savefig(options.output, dpi=90)
    print(f"{'without':>16} {'predicted':>10} {'measured':>10}")
    for name in SOURCES:
        means = (statistics.fmean(changes[name]) for changes in (predicted, measured))
        print(f"{name:>16} " + " ".join(f"{mean:>+10.3f}" for mean in means))
    print(f"wrote {options.output}")
    return predicted, measured


if __name__ == "__main__":
    main()
