"""The benchmark tasks: data, model, recipe, and one trained model each.

Layouts: ``digits_mlp`` 64-64-32-10 with GELU, 6,570 parameters; ``digits_cnn`` conv(1, 16, 3, padding 1) -
ReLU - max-pool 2 - conv(16, 32, 3, padding 1) - ReLU - 512 - 64 - 10, 38,282 parameters; ``large_mlp``
784-1024-1024-10 with ReLU; ``transformer`` 4 pre-norm blocks over characters, d 128, 4 heads.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lightning
import torch
from meter import TensorTable, as_batch
from nets import CONTEXT, VOCABULARY, CharacterTransformer, cnn_net, large_mlp_net, small_mlp_net
from recipes import Recipe, make_optimizer
from safetensors.torch import load_file, save_file
from stacked_training import fingerprint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence.evaluation.losses import binary_cross_entropy, cross_entropy, squared_error

CACHE = Path(__file__).parent / ".cache"


Loss = Callable[[Tensor, Tensor], Tensor]


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each text ``(B,)``, the mean over its tokens, of logits ``(B, T, C)``."""
    return nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


# By name: the batch's loss as a user calls it, and the same loss example by example, for retraining.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "cross_entropy": (nn.functional.cross_entropy, cross_entropy),
    "tokens": (nn.functional.cross_entropy, token_cross_entropy),
    "mse": (nn.functional.mse_loss, squared_error),
    "bce": (nn.functional.binary_cross_entropy_with_logits, binary_cross_entropy),
}


class TaskModule(lightning.LightningModule):
    """An ordinary LightningModule: the loss of ``net``, logged, with the recipe's optimizer and schedule."""

    def __init__(self, net: nn.Module, recipe: Recipe, loss: str = "cross_entropy") -> None:
        super().__init__()
        self.net, self.recipe, self.loss = net, recipe, LOSSES[loss][0]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of a batch."""
        outputs: Tensor = self.net(inputs)
        return outputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's mean loss."""
        inputs, targets = batch
        outputs = self(inputs)
        if targets.is_floating_point():
            loss = self.loss(outputs, targets)
        else:
            loss = self.loss(outputs.flatten(0, -2), targets.flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> lightning.pytorch.utilities.types.OptimizerLRScheduler:
        """Return the recipe's optimizer and schedule, per step."""
        recipe = self.recipe
        optimizer = make_optimizer(self.parameters(), recipe)
        total = int(self.trainer.estimated_stepping_batches)
        factor = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: recipe.rate(k, total) / recipe.learning_rate
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}


@dataclass(frozen=True)
class Task:
    """One task: what is trained, on what, how, and the batch size at which passes are measured."""

    name: str
    net: Callable[[], nn.Module]
    train: TensorTable
    queries: TensorTable
    recipe: Recipe
    pass_batch: int
    loss: str = "cross_entropy"

    @property
    def example_loss(self) -> Loss:
        """The loss of each example, from outputs and targets."""
        return LOSSES[self.loss][1]

    def train_loader(self, seed: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled batches as in training."""
        order = torch.Generator().manual_seed(seed)
        size = self.recipe.batch_size
        return DataLoader(self.train, size, shuffle=True, generator=order, collate_fn=as_batch)

    def pass_loader(self, table: TensorTable | None = None) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches in order, of ``pass_batch`` examples: for attribution passes and the plain epoch."""
        return DataLoader(self.train if table is None else table, self.pass_batch, collate_fn=as_batch)

    def untrained(self) -> TaskModule:
        """The module, freshly initialised from the global random state."""
        return TaskModule(self.net(), self.recipe, self.loss)

    def trained(self, seed: int = 0) -> TaskModule:
        """The model trained on all examples by a Lightning Trainer, in eval mode; cached on disk."""
        path = self.model_path(seed)
        if not path.exists():
            save_model(fit(self, seed).state_dict(), path)
        module = self.untrained()
        module.load_state_dict(load_file(path))
        return module.eval()

    def model_path(self, seed: int) -> Path:
        """Where the trained model is kept: under the hash of all that decides it."""
        tensors = (*self.train.tensors, *self.queries.tensors)
        functions = () if self.loss == "cross_entropy" else (self.example_loss,)
        key = fingerprint(self.net, self.recipe, tensors, functions)
        return CACHE / "models" / f"{self.name}-{seed}-{key}.safetensors"


def save_model(state: dict[str, Tensor], path: Path) -> None:
    """Write a model's tensors atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    save_file(state, temporary)
    os.replace(temporary, path)


def fit(task: Task, seed: int, callbacks: list[lightning.Callback] | None = None) -> TaskModule:
    """Train a task's module in the ordinary way; the global random state is left as it was."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        module = task.untrained()
        trainer = lightning.Trainer(
            max_epochs=task.recipe.epochs,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, task.train_loader(seed))
    return module


@cache
def digits_tables() -> tuple[TensorTable, TensorTable]:
    """scikit-learn's digits in ``[0, 1]``, split 90/10 with a fixed seed: 1617 for training, 180 queries."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(digits.data / 16.0, digits.target, test_size=0.1, random_state=0)
    x_train, x_query = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y_train, y_query = (torch.tensor(part) for part in parts[2:])
    return TensorTable(x_train, y_train), TensorTable(x_query, y_query)


def digits_mlp() -> Task:
    """The setting of Hong et al. 2025."""
    recipe = Recipe(0.05, epochs=100, batch_size=32, momentum=0.9, weight_decay=1e-3)
    return Task("digits_mlp", small_mlp_net, *digits_tables(), recipe, pass_batch=1024)


def digits_cnn() -> Task:
    """Digits as images; 30 epochs, so that the run's own damping is 3.6e-3."""
    tables = [TensorTable(t.tensors[0].view(-1, 1, 8, 8), t.tensors[1]) for t in digits_tables()]
    recipe = Recipe(0.05, epochs=30, batch_size=32, momentum=0.9, weight_decay=1e-3)
    return Task("digits_cnn", cnn_net, tables[0], tables[1], recipe, pass_batch=1024)


def large_mlp() -> Task:
    """10,000 generated examples: 10 classes of 3 clusters in 20 dimensions, bent into 784, with noise."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(30, 20, generator=generator) * 1.2
    cluster = torch.randint(30, (10_500,), generator=generator)
    latent = centres[cluster] + torch.randn(10_500, 20, generator=generator)
    bend = torch.randn(20, 784, generator=generator) / 20**0.5
    inputs = (latent @ bend).tanh() + 0.3 * torch.randn(10_500, 784, generator=generator)
    table = TensorTable(inputs, cluster % 10)
    queries = TensorTable(*(tensor[10_000:] for tensor in table.tensors))
    recipe = Recipe(0.05, epochs=20, batch_size=128, momentum=0.9, weight_decay=1e-3)
    return Task("large_mlp", large_mlp_net, table.head(10_000), queries, recipe, pass_batch=500)


def transformer() -> Task:
    """450 passages of 64 characters from the source text of the standard library's argparse."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    codes = torch.tensor([min(ord(character), VOCABULARY - 1) for character in text])
    rows = codes[: 450 * (CONTEXT + 1)].view(450, CONTEXT + 1)
    rows = rows[torch.randperm(450, generator=torch.Generator().manual_seed(0))]
    table = TensorTable(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    queries = TensorTable(*(tensor[400:] for tensor in table.tensors))
    recipe = Recipe(0.05, epochs=20, batch_size=16, momentum=0.9, weight_decay=1e-4)
    return Task("transformer", CharacterTransformer, table.head(400), queries, recipe, pass_batch=50)


TASKS: dict[str, Callable[[], Task]] = {
    task.__name__: task for task in (digits_mlp, digits_cnn, large_mlp, transformer)
}
