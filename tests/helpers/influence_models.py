"""A small module, its data and Trainers for the tests of the public entry points."""

from __future__ import annotations

import logging
from typing import Any

import lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceTrainer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(lightning.LightningModule):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)


def dataset(count: int = 22, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)


def train(**options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(), **{"batch_size": 5, "shuffle": True, **options})


def queries(count: int = 4) -> DataLoader[Any]:
    return DataLoader(dataset(count, seed=1), 3)


def trainer(*callbacks: lightning.Callback, kind: type = InfluenceTrainer, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_epochs": 6,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, lightning.pytorch.callbacks.Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    return kind(callbacks=list(callbacks), **settings)


def fitted(*callbacks: lightning.Callback, module: Any = None, **options: Any) -> tuple[Any, Any]:
    """A Trainer with the callback after a fit, and the module."""
    host = trainer(InfluenceCallback(every_n_steps=1), *callbacks, **options)
    module = Net() if module is None else module
    host.fit(module, train())
    return host, module


def names(result: Any) -> list[str]:
    """What passes an answer took."""
    return [facts["name"].removeprefix("Influence: ") for facts in result.diagnostics.passes]
