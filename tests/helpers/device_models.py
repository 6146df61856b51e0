"""Small models with every kind of parameter, and fits of them on a given device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from pretended_device import make_trainer_arguments
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceTrainer

EXAMPLES, QUERIES, BATCH, CLASSES, TOKENS, LENGTH = 32, 6, 16, 3, 5, 3


class Convolutional(nn.Module):
    """Convolution, norms, and linear layers."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, padding=1)
        self.group_norm = nn.GroupNorm(3, 3)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, CLASSES)
        )

    def forward(self, x):
        return self.head(self.group_norm(self.convolution(x)).relu())

    @staticmethod
    def draw(count, generator):
        return torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)


class Sequential(nn.Module):
    """An embedding, a recurrent layer, attention, and a parameter of the model's own.

    None has more numbers than there are examples: rounding picks the basis of a covariance's null space.
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 3)
        self.positions = nn.Parameter(torch.randn(LENGTH, 3) / 10)
        self.recurrent = nn.GRU(3, 3, batch_first=True)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, CLASSES)

    def forward(self, x):
        states, _ = self.recurrent(self.embedding(x) + self.positions)
        mixed, _ = self.attention(states, states, states, need_weights=False)
        return self.head(self.norm(states + mixed).mean(1))

    @staticmethod
    def draw(count, generator):
        return torch.randint(0, TOKENS, (count, LENGTH), generator=generator)


MODELS = {"convolutional": Convolutional, "sequential": Sequential}


class Task(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


class Fitted(NamedTuple):
    trainer: InfluenceTrainer
    module: Task
    train: DataLoader
    queries: DataLoader


def make_loader(kind, count, seed, batch=BATCH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    inputs = MODELS[kind].draw(count, generator)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch)


def make_trainer(device, callbacks, **options):
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    return InfluenceTrainer(callbacks=callbacks, **quiet, **make_trainer_arguments(device), **options)


def fit(
    kind,
    device,
    *,
    epochs=4,
    examples=EXAMPLES,
    batch=BATCH,
    dtype=torch.float64,
    collects=True,
    more=(),
    **options,
):
    """Fit a model with the callback, which collects every step unless told otherwise."""
    torch.manual_seed(0)
    module = Task(MODELS[kind]()).to(dtype)
    settings = {"every_n_steps": 1, "dynamics": True, "strict": True}
    callbacks = [InfluenceCallback(**settings)] if collects is True else [*(collects or ())]
    trainer = make_trainer(device, [*callbacks, *more], max_epochs=epochs, **options)
    loaders = make_loader(kind, examples, 1, batch, dtype), make_loader(kind, QUERIES, 2, batch, dtype)
    trainer.fit(module, loaders[0])
    return Fitted(trainer, module, *loaders)
