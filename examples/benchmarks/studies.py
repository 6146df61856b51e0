"""Small tasks that differ in size, loss, optimizer, label noise and subset fraction, for the damping study.

Each is a :class:`tasks.Task` and the share of the examples that its retrained models keep. All are small
enough for the dense Gauss-Newton matrix and for hundreds of retrainings in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from nets import blobs_net, cancer_net, diabetes_net, narrow_mlp_net
from recipes import Recipe
from stacked_training import Progress, retrain
from tasks import CACHE, Task, TensorTable, digits_mlp, digits_tables
from torch import Tensor, nn

from lightning_influence.evaluation.lds import random_subsets


@dataclass(frozen=True)
class Study:
    """A task, the share of examples that subsets keep, and how many subsets and seeds are retrained."""

    task: Task
    fraction: float
    subsets: int = 100
    seeds: int = 8

    def truth(self, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """Kept examples ``(M, N)`` and the queries' losses after retraining ``(M, S, Q)``, cached.

        Args:
            progress: called as ``progress(done, total)`` after every chunk of runs.

        Returns:
            Masks and losses.
        """
        task = self.task
        masks = random_subsets(len(task.train), 100, self.fraction, seed=0)[: self.subsets]
        losses = retrain(
            task.net,
            task.recipe,
            task.train.tensors,
            masks,
            range(self.seeds),
            queries=task.queries.tensors,
            loss=task.example_loss,
            measurement=task.example_loss,
            cache_dir=CACHE / "truth" / task.name,
            chunk=100,
            progress=progress,
        )
        return masks, losses


def _study(
    name: str,
    net: Callable[[], nn.Module],
    tables: tuple[TensorTable, TensorTable],
    recipe: Recipe,
    *,
    fraction: float,
    loss: str = "cross_entropy",
) -> Study:
    return Study(Task(name, net, *tables, recipe, pass_batch=1024, loss=loss), fraction)


def _few_digits(count: int, flipped: float = 0.0) -> tuple[TensorTable, TensorTable]:
    """The first digits, a share of their labels replaced by another class."""
    train, queries = digits_tables()
    inputs, labels = (tensor[:count].clone() for tensor in train.tensors)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(count, generator=generator)[: int(flipped * count)]
    labels[chosen] = (labels[chosen] + torch.randint(1, 10, chosen.shape, generator=generator)) % 10
    return TensorTable(inputs, labels), queries


def _split(inputs: Tensor, targets: Tensor, queries: int) -> tuple[TensorTable, TensorTable]:
    """Standardised inputs with a random split of fixed seed; the last ``queries`` are held out."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).float()[order]
    targets = targets[order]
    count = len(inputs) - queries
    return TensorTable(inputs[:count], targets[:count]), TensorTable(inputs[count:], targets[count:])


def _diabetes() -> tuple[TensorTable, TensorTable]:
    from sklearn.datasets import load_diabetes

    inputs, targets = (torch.tensor(part) for part in load_diabetes(return_X_y=True))
    targets = ((targets - targets.mean()) / targets.std()).float()
    return _split(inputs, targets.unsqueeze(1), queries=102)


def _cancer() -> tuple[TensorTable, TensorTable]:
    from sklearn.datasets import load_breast_cancer

    inputs, targets = (torch.tensor(part) for part in load_breast_cancer(return_X_y=True))
    return _split(inputs, targets.float().unsqueeze(1), queries=119)


def _blobs() -> tuple[TensorTable, TensorTable]:
    """Four classes of three overlapping clusters each, in 20 dimensions."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 20, generator=generator)
    cluster = torch.randint(12, (950,), generator=generator)
    inputs = centres[cluster] + 1.2 * torch.randn(950, 20, generator=generator)
    return _split(inputs, cluster % 4, queries=150)


def digits_half() -> Study:
    """The digits MLP, on a part of the ground truth that the benchmarks use."""
    return Study(digits_mlp(), 0.5, subsets=50, seeds=4)


def digits_few() -> Study:
    """150 digits, fitted to saturation."""
    recipe = Recipe(0.05, epochs=60, batch_size=16, momentum=0.9, weight_decay=1e-3)
    return _study("digits_few", narrow_mlp_net, _few_digits(150), recipe, fraction=0.5)


def digits_noisy() -> Study:
    """500 digits, a fifth of them with a wrong label."""
    recipe = Recipe(0.05, epochs=60, batch_size=32, momentum=0.9, weight_decay=1e-3)
    return _study("digits_noisy", narrow_mlp_net, _few_digits(500, 0.2), recipe, fraction=0.7)


def digits_adam() -> Study:
    """600 digits with Adam; subsets keep most of them."""
    recipe = Recipe(3e-3, epochs=40, batch_size=32, weight_decay=1e-4, schedule="cosine", optimizer="adam")
    return _study("digits_adam", narrow_mlp_net, _few_digits(600), recipe, fraction=0.8)


def diabetes_sgd() -> Study:
    """A noisy regression with SGD."""
    recipe = Recipe(0.02, epochs=60, batch_size=32, momentum=0.9, weight_decay=1e-3)
    return _study("diabetes_sgd", diabetes_net, _diabetes(), recipe, fraction=0.5, loss="mse")


def diabetes_adam() -> Study:
    """The same regression with Adam."""
    recipe = Recipe(5e-3, epochs=60, batch_size=32, weight_decay=1e-3, optimizer="adam")
    return _study("diabetes_adam", diabetes_net, _diabetes(), recipe, fraction=0.5, loss="mse")


def cancer_bce() -> Study:
    """An easy binary classification; subsets keep less than a third."""
    recipe = Recipe(0.05, epochs=40, batch_size=32, momentum=0.9, weight_decay=1e-3, schedule="cosine")
    return _study("cancer_bce", cancer_net, _cancer(), recipe, fraction=0.3, loss="bce")


def blobs_adamw() -> Study:
    """Generated classes with AdamW and a decay that matters."""
    recipe = Recipe(3e-3, epochs=30, batch_size=32, weight_decay=0.1, optimizer="adamw")
    return _study("blobs_adamw", blobs_net, _blobs(), recipe, fraction=0.5)


STUDIES: dict[str, Callable[[], Study]] = {
    "digits_mlp": digits_half,
    **{
        study.__name__: study
        for study in (
            digits_few,
            digits_noisy,
            digits_adam,
            diabetes_sgd,
            diabetes_adam,
            cancer_bce,
            blobs_adamw,
        )
    },
}
