"""Factories that worker processes import by name."""

import contextlib
import fcntl
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 2
RATE = 0.05


class Ridge(LightningModule):
    """Linear regression, one full batch an epoch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1).double()

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Counted(Ridge):
    """Leaves a mark for every run that finishes, and dies once where a file asks for it."""

    def on_train_start(self):
        folder = Path(os.environ["HARNESS_TEST_FOLDER"])
        done = len(list(folder.glob("run-*")))
        if done >= 2 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self):
        folder = Path(os.environ["HARNESS_TEST_FOLDER"])
        (folder / f"run-{os.getpid()}-{len(list(folder.iterdir()))}").touch()


class Endless(Ridge):
    """The first to train never ends; the others do."""

    def on_train_start(self):
        with contextlib.suppress(FileExistsError):
            (Path(os.environ["HARNESS_TEST_FOLDER"]) / "endless").touch(exist_ok=False)
            while True:
                torch.ones(100).sum()


def endless():
    return Endless()


HELD = []


def held_data():
    """The data; this process holds a lock until it ends, by which others know that it lives."""
    file = (Path(os.environ["HARNESS_TEST_FOLDER"]) / f"{os.getpid()}.lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    HELD.append(file)
    return data()


def ridge():
    return Ridge()


def counted():
    return Counted()


def diverging():
    module = Ridge()
    nn.init.constant_(module.layer.weight, float("inf"))
    return module


ONE_MODULE = Ridge()


def same_module():
    return ONE_MODULE


LAYER = nn.Linear(3, 1).double()


def shared_layer():
    module = Ridge()
    module.layer = LAYER
    return module


def trainer(**changes):
    settings = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**settings | changes)


def idle_trainer():
    return trainer(max_steps=0, max_epochs=None)


ONE_TRAINER = []


def same_trainer():
    if not ONE_TRAINER:
        ONE_TRAINER.append(trainer())
    return ONE_TRAINER[0]


def draw(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True).tanh())


def data():
    return draw(8, 0)


def loader(dataset):
    return DataLoader(dataset, batch_size=100)


def queries():
    return DataLoader(draw(5, 1), batch_size=2)


def prediction(module, batch):
    return module.layer(batch[0]).squeeze(1)
