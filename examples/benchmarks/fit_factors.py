"""Factors that :class:`InfluenceCallback` collects in a fit, against factors fitted in a pass after it.

``python examples/benchmarks/fit_factors.py [--small] [--rounds 3] [case ...]``. The cases ``bert``,
``llama``, ``vit`` and ``convnext`` are small models of transformers, torchvision and timm with random
weights, trained on the digits or on the topics of Python's own help; they need
``pip install -e ".[examples,projects]"``.

Columns: CPU seconds of a fit on one thread without and with the callback (in turn, best of several rounds),
and what passes in its hooks as a share of the rest of a fit that is timed there alone, which neighbours
change little (median), of it what training dynamics take; examples that covariances are made of and, in the
fit, eigenvalues (of the layer with the fewest); mean rank correlation of the queries' EK-FAC scores with
those from factors that are fitted in a pass, and how much larger they are; the same of scores from a second
pass with other random draws, which no estimate from the fit can be expected to exceed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import logging
import pydoc_data.topics
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lightning
import torch
from hook_clock import measure_shares
from rich.console import Console
from rich.table import Table
from tasks import TASKS, TaskModule, as_batch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_influence import InfluenceCallback, InfluenceTrainer
from lightning_influence.curvature.factors import Factors

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
BATCH, CLASSES, WORDS, LENGTH, QUERIES = 32, 10, 1000, 24, 32
SMALL_EPOCHS = 2


class Rows(Dataset[Any]):
    """Examples of equal shapes, each a dictionary."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {name: column[number] for name, column in self.columns.items()}


class Published(lightning.LightningModule):
    """What a user writes around a published model, whose batches are dictionaries."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's mean loss, which models of text compute themselves."""
        if "images" in batch:
            loss = nn.functional.cross_entropy(self.model(batch["images"]), batch["labels"])
        else:
            loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Case:
    """One model, with what it is trained on and for how long."""

    name: str
    module: Callable[[], lightning.LightningModule]
    train: Dataset[Any]
    queries: Dataset[Any]
    epochs: int
    batch: int = BATCH
    collate: Callable[[Any], Any] | None = None

    def loader(self, *, shuffle: bool = True, queries: bool = False) -> DataLoader[Any]:
        """Return a loader of the training examples or of the queries."""
        data = self.queries if queries else self.train
        return DataLoader(data, self.batch, shuffle=shuffle and not queries, collate_fn=self.collate)


@functools.cache
def read_digits() -> tuple[Tensor, Tensor]:
    """Return the digits' pixels ``(N, 64)`` between 0 and 16 and their labels, shuffled."""
    pixels, labels = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels, dtype=torch.float32)[order], torch.tensor(labels)[order].long()


def split(count: int, **columns: Tensor) -> tuple[Rows, Rows]:
    """Return the first examples for training, and queries after them."""
    first = {name: column[:count] for name, column in columns.items()}
    return Rows(**first), Rows(**{name: c[count : count + QUERIES] for name, c in columns.items()})


def bert() -> Case:
    """Sequences of 64 pixels, classified."""
    transformers = importlib.import_module("transformers")
    pixels, labels = read_digits()
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=80, num_labels=CLASSES,
    )  # fmt: skip
    train, queries = split(512, input_ids=pixels.long() + 2, labels=labels)
    module = functools.partial(_publish, transformers.BertForSequenceClassification, config)
    return Case("bert", module, train, queries, 20)


def llama() -> Case:
    """Blocks of words, each word from those before it."""
    transformers = importlib.import_module("transformers")
    words = re.findall(r"\w+|[^\w\s]", "\n".join(pydoc_data.topics.topics.values()).lower())
    known = {word: n + 2 for n, (word, _) in enumerate(Counter(words).most_common(WORDS - 2))}
    text = torch.tensor([known.get(word, 1) for word in words[: (256 + QUERIES) * LENGTH]]).view(-1, LENGTH)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    train, queries = split(256, input_ids=text, labels=text)
    module = functools.partial(_publish, transformers.LlamaForCausalLM, config)
    return Case("llama", module, train, queries, 40)


def _publish(make: Callable[[Any], nn.Module], config: Any) -> Published:
    return Published(make(config))


def _images() -> tuple[Rows, Rows]:
    pixels, labels = read_digits()
    images = nn.functional.interpolate((pixels / 16).view(-1, 1, 8, 8), size=(32, 32), mode="bilinear")
    return split(512, images=(images.expand(-1, 3, -1, -1).contiguous() - 0.3) / 0.35, labels=labels)


def vit() -> Case:
    """Images, in patches of 8 by 8."""
    models = importlib.import_module("torchvision.models")
    shape = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 4, "hidden_dim": 64}
    net = functools.partial(models.VisionTransformer, **shape, mlp_dim=128, num_classes=CLASSES)
    return Case("vit", lambda: Published(net()), *_images(), 20)


def convnext() -> Case:
    """Images, by convolutions in groups."""
    timm = importlib.import_module("timm")
    shape = {"dims": (16, 32, 64, 64), "depths": (1, 1, 2, 1), "num_classes": CLASSES}
    net = functools.partial(timm.create_model, "convnext_atto", pretrained=False, **shape)
    return Case("convnext", lambda: Published(net()), *_images(), 20)


def task(name: str) -> Case:
    """One of the benchmark tasks, with the model and recipe that it has there."""
    made = TASKS[name]()
    module = functools.partial(TaskModule, made.net(), made.recipe, made.loss)
    queries = made.queries.head(QUERIES)
    return Case(name, module, made.train, queries, made.recipe.epochs, made.recipe.batch_size, as_batch)


PUBLISHED: dict[str, Callable[[], Case]] = {"bert": bert, "llama": llama, "vit": vit, "convnext": convnext}
CASES = PUBLISHED | {name: functools.partial(task, name) for name in TASKS}


@dataclass(frozen=True)
class Result:
    """What one case came to.

    Attributes:
        case: its name.
        steps: optimizer steps of a fit.
        plain: CPU seconds of fits without the callback.
        collecting: of fits with it.
        hooks: share of the rest of such fits that the callback's hooks took.
        dynamics: share of it that training dynamics took in these.
        batches: how many batches one fit collected from.
        examples: the fewest examples behind the covariances of a layer.
        squares: the fewest behind the eigenvalues, 0 where there were none at the end of the fit.
        rank: mean rank correlation of the queries' scores with those from refitted factors.
        norm: their norm over that of those.
        again: both figures of scores from factors that are fitted once more, with other draws.
    """

    case: str
    steps: int
    plain: tuple[float, ...]
    collecting: tuple[float, ...]
    hooks: tuple[float, ...]
    dynamics: tuple[float, ...]
    batches: int
    examples: float
    squares: float
    rank: float
    norm: float
    again: tuple[float, float]

    @property
    def overhead(self) -> float:
        """Best with the callback over best without, less 1."""
        return min(self.collecting) / min(self.plain) - 1


def fit(case: Case, callback: InfluenceCallback | None) -> tuple[float, InfluenceTrainer, Any]:
    """Fit a case from the same seed every time.

    Returns:
        CPU seconds, the Trainer, and the module.
    """
    lightning.seed_everything(0, verbose=False)
    module, callbacks = case.module(), [] if callback is None else [callback]
    trainer = InfluenceTrainer(max_epochs=case.epochs, callbacks=list(callbacks), **QUIET)
    trainer.callbacks = [
        c for c in trainer.callbacks if callback is not None or not isinstance(c, InfluenceCallback)
    ]
    gc.collect()
    start = time.process_time()
    trainer.fit(module, case.loader())
    return time.process_time() - start, trainer, module


def compare(
    case: Case, trainer: InfluenceTrainer, module: Any, collected: Factors
) -> list[tuple[float, float]]:
    """Compare EK-FAC scores from the fit, and from a second refit, with those from refitted factors.

    What the fit has collected is passed, so that it is used as it is: factors without eigenvalues, of models
    as small, would be fitted anew otherwise.

    Returns:
        Mean rank correlation and relative norm, of the two.
    """
    ask = functools.partial(trainer.influence, module, case.loader(), case.loader(queries=True))
    fitted, refitted, again = (
        ask(method="ekfac", log=False, factors=factors, seed=seed).scores
        for factors, seed in ((collected, 0), ("refit", 1), ("refit", 2))
    )
    return [
        (correlate(scores, refitted), float(scores.norm() / refitted.norm())) for scores in (fitted, again)
    ]


def correlate(one: Tensor, other: Tensor) -> float:
    """Return the rank correlation of two matrices of scores ``(Q, N)``, averaged over the queries."""
    ranks = [scores.argsort(1).argsort(1).double() for scores in (one, other)]
    first, second = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    return float(((first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))).mean())


def run(case: Case, rounds: int) -> Result:
    """Fit a case ``rounds`` times without and with the callback, in turn, and compare its factors."""
    fit(replace(case, epochs=1), InfluenceCallback())  # warm-up
    plain, collecting, shares = [], [], []
    for _ in range(rounds):
        plain.append(fit(case, None)[0])
        callback = InfluenceCallback()
        seconds, trainer, module = fit(case, callback)
        collecting.append(seconds)
        shares.append(measure_shares(lambda clocked: fit(case, clocked)[0]))
    hooks, dynamics = zip(*shares, strict=True)
    layers = callback.factors.layers.values()
    examples = min(layer.examples for layer in layers)
    squares = min(layer.squares_examples for layer in layers)
    (rank, norm), again = compare(case, trainer, module, callback.factors)
    return Result(
        case.name, trainer.global_step, tuple(plain), tuple(collecting), hooks, dynamics,
        callback.num_collected, examples, squares, rank, norm, again,
    )  # fmt: skip


def render(results: list[Result], console: Console | None = None) -> None:
    """Print a table of results, to the terminal by default."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 150
    table = Table(title="Factors from the fit against factors from a pass after it")
    table.add_column("case")
    columns = (
        "steps", "plain", "with callback", "overhead", "in hooks", "of it dynamics", "batches",
        "examples of covariances", "of eigenvalues", "rank correlation", "norm", "of a second pass",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            r.case, str(r.steps), f"{min(r.plain):.2f}", f"{min(r.collecting):.2f}",
            f"{100 * r.overhead:+.1f} %", f"{100 * statistics.median(r.hooks):.1f} %",
            f"{100 * statistics.median(r.dynamics):.1f} %", str(r.batches),
            f"{r.examples:g}", f"{r.squares:g}",
            f"{r.rank:.3f}", f"{r.norm:.2f}", f"{r.again[0]:.3f}, {r.again[1]:.2f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Measure the chosen cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(PUBLISHED), help=f"of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=3, help="fits of each kind")
    parser.add_argument("--small", action="store_true", help=f"one round of {SMALL_EPOCHS} epochs")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    unknown = sorted(set(arguments.cases) - set(CASES))
    if unknown:
        parser.error(f"unknown cases {unknown}; choose of {', '.join(CASES)}")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    results = []
    for name in arguments.cases:
        case = CASES[name]()
        if arguments.small:
            case = replace(case, epochs=SMALL_EPOCHS)
        results.append(run(case, 1 if arguments.small else arguments.rounds))
    render(results)


if __name__ == "__main__":
    main()
