"""Which training images are behind a model's mistakes, and which labels are wrong? On scikit-learn's digits.

Trains an MLP and a small CNN, asks for the training images behind the test images that each gets wrong or is
least certain of, then flips 5% of the training labels and finds them again by self-influence.

    python examples/digits.py [--output runs/digits] [--fast]
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch
from _digits_models import CNN, MLP, Batch, Classifier, DigitsData
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler

from lightning_influence import Attributions, InfluenceCallback, InfluenceTrainer, Labels
from lightning_influence.evaluation import mislabel_auroc
from lightning_influence.results.loggers import log_attributions
from lightning_influence.results.plots import montage

QUERIES = 4  # of either kind
console = Console()


def make_trainer(kind: type[Trainer], name: str, epochs: int, output: Path) -> Trainer:
    """A Trainer as for any training, with one more callback."""
    return kind(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[InfluenceCallback()],
        logger=[TensorBoardLogger(output / "tensorboard", name), CSVLogger(output / "csv", name)],
        enable_model_summary=False,
        log_every_n_steps=20,
        check_val_every_n_epoch=5,
    )


def doubtful(probabilities: Tensor, labels: Tensor) -> list[int]:
    """Indices of misclassified test images, the most confident first, and of the least certain others."""
    confidence, predicted = probabilities.max(dim=1)
    wrong = predicted != labels
    mistakes = confidence.where(wrong, -1).argsort(descending=True)[: min(QUERIES, int(wrong.sum()))]
    uncertain = confidence.where(~wrong, 2).argsort()[:QUERIES]
    return [*mistakes.tolist(), *uncertain.tolist()]


def explain(trainer: Trainer, model: Classifier, data: DigitsData, output: Path) -> Attributions:
    """Ask for the training images behind the doubtful test images; print, draw, log and save the answer."""
    probabilities = torch.cat(trainer.predict(model, datamodule=data))
    images, labels = data.test_set.tensors
    asked = doubtful(probabilities, labels)
    queries: DataLoader[Batch] = DataLoader(
        data.test_set, batch_size=len(asked), sampler=SubsetRandomSampler(asked)
    )

    # `log=False` because the picture is to be logged along, below.
    attributions = trainer.influence(model, datamodule=data, query_dataloaders=queries, log=False)

    seen = [
        f"{label} seen as {p.argmax()}, {p.max():.0%}" for label, p in zip(labels, probabilities, strict=True)
    ]
    texts = Labels(train=[f"a {label}" for label in data.train_set.tensors[1]], query=seen)
    console.print(attributions.top(5, labels=texts))
    console.print(attributions.bottom(5, labels=texts))
    for name, value in attributions.diagnostics.facts():
        console.print(f"  [bold]{name}[/bold]: {value}", highlight=False)

    figure = montage(attributions, data.train_set.tensors[0], images, k=5, labels=texts)
    files = log_attributions(
        trainer.loggers,
        attributions,
        step=trainer.global_step,
        directory=output / type(model).__name__.lower(),
        figures={"montage": figure},
        labels=texts,
    )
    console.print("wrote", *map(str, files), highlight=False, soft_wrap=True)
    return attributions


def find_flipped(epochs: int, output: Path) -> float:
    """Flip 5% of the training labels, train again, and look for them at the top of self-influence."""
    data, model = DigitsData(flipped=0.05), MLP()
    trainer = make_trainer(InfluenceTrainer, "flipped", epochs, output)
    trainer.fit(model, datamodule=data)
    self_influence = trainer.self_influence(model, datamodule=data)
    flipped = data.is_flipped[self_influence.train_indices]
    auroc = float(mislabel_auroc(self_influence.scores, flipped))
    texts = Labels(train=["flipped" if wrong else "correct" for wrong in data.is_flipped])
    console.print(self_influence.top(10, labels=texts))
    count = int(flipped.sum())
    found = int(flipped[self_influence.scores.argsort(descending=True)[:count]].sum())
    console.print(f"{found} of {count} flipped labels are among the {count} highest self-influences")
    console.print(f"AUROC of self-influence as a detector of flipped labels: {auroc:.3f}")
    return auroc


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="folder for logs and files")
    parser.add_argument("--fast", action="store_true", help="fewer epochs: to see that everything runs")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    torch.set_num_threads(1)  # the networks are so small that threads would wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data is in memory
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # Lightning 2.6 on torch 2.13
    data = DigitsData()
    for kind, model, epochs in ((InfluenceTrainer, MLP, 40), (Trainer, CNN, 15)):
        console.rule(f"{model.__name__}: training images behind doubtful test images")
        seed_everything(0, verbose=False)
        trainer = make_trainer(kind, model.__name__.lower(), 5 if options.fast else epochs, options.output)
        network = model()
        trainer.fit(network, datamodule=data)
        explain(trainer, network, data, options.output)
    console.rule("MLP: which labels are wrong?")
    seed_everything(0, verbose=False)
    find_flipped(5 if options.fast else 20, options.output)
    console.print(
        f"{time.perf_counter() - start:.0f} s; look at the logs: tensorboard --logdir {options.output}"
    )


if __name__ == "__main__":
    main()
