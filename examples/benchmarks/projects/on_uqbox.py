"""Uncertainty methods on a small network: losses of their own, and batches that are dictionaries."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from harness import QUIET, Fitted, collate_singles, run

# isort: split

import lightning.pytorch as pl
import lightning_uq_box.uq_methods as methods
import numpy as np
import torch
from lightning_uq_box.models import MLP
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

COUNT, EPOCHS = 96, 4
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def _net(outputs: int) -> nn.Module:
    return MLP(n_inputs=3, n_hidden=[16, 16], n_outputs=outputs, activation_fn=nn.ReLU())


METHODS: dict[str, Any] = {
    "DeterministicRegression, MSE": lambda: methods.DeterministicRegression(
        _net(1), loss_fn=nn.MSELoss(), optimizer=ADAM
    ),
    "DeterministicRegression, L1": lambda: methods.DeterministicRegression(
        _net(1), loss_fn=nn.L1Loss(), optimizer=ADAM
    ),
    "DeterministicClassification": lambda: methods.DeterministicClassification(
        _net(2), loss_fn=nn.CrossEntropyLoss(), optimizer=ADAM
    ),
    "MVERegression": lambda: methods.MVERegression(_net(2), burnin_epochs=2, optimizer=ADAM),
    "QuantileRegression": lambda: methods.QuantileRegression(
        _net(3), optimizer=ADAM, quantiles=[0.1, 0.5, 0.9]
    ),
    "DER": lambda: methods.DER(_net(4), optimizer=ADAM),
    "BNN_VI_ELBO_Regression": lambda: methods.BNN_VI_ELBO_Regression(
        _net(1), criterion=nn.MSELoss(), burnin_epochs=0, num_mc_samples_train=2, num_mc_samples_test=2,
        optimizer=ADAM,
    ),
}  # fmt: skip


def _variational(module: Any) -> list[Any]:
    return [part for part in module.modules() if hasattr(part, "freeze_layer")]


@contextlib.contextmanager
def same_draws(module: Any) -> Iterator[None]:
    """Let weights be the last draw each time."""
    for part in _variational(module):
        part.is_frozen = True  # freeze_layer() would draw anew
    try:
        yield
    finally:
        for part in _variational(module):
            part.is_frozen = False


def _likelihood(module: Any, batch: Any) -> torch.Tensor:
    """Return the part of the loss that goes with the data; the other is of the weights alone."""
    loss = module.num_training_points * module.criterion(module(batch["input"]), batch["target"])
    assert isinstance(loss, torch.Tensor)
    return loss


class Points(Dataset[dict[str, torch.Tensor]]):
    """Items of the project's form."""

    def __init__(self, classify: bool) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(COUNT, 3)).astype("float32")
        self.inputs = torch.tensor(x)
        noise = rng.normal(size=(COUNT, 1)).astype("float32") * 0.1
        self.targets = (
            (self.inputs.sum(1) > 0).long()
            if classify
            else self.inputs.sum(1, keepdim=True) + torch.tensor(noise)
        )

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        return {"input": self.inputs[n], "target": self.targets[n]}


class Data(pl.LightningDataModule):
    """The training examples."""

    def __init__(self, points: Points) -> None:
        super().__init__()
        self.points = points

    def train_dataloader(self) -> Any:
        """Return the loader."""
        return DataLoader(self.points, batch_size=16, shuffle=True)


def fit(kind: str, callbacks: list[Any]) -> Fitted:
    """Train as in the project's tutorials."""
    pl.seed_everything(0)
    module, points = METHODS[kind](), Points("Classification" in kind)
    data = Data(points)
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=callbacks, **QUIET)
    trainer.fit(module, datamodule=data)
    singles = collate_singles(points, default_collate, 2)
    queries = DataLoader(Subset(points, range(12)), batch_size=8)
    fitted = Fitted(trainer, module, data.train_dataloader(), queries, EPOCHS, singles, singles[:12])
    if kind.startswith("BNN"):
        fitted.loss, fitted.quiet = _likelihood, functools.partial(same_draws, module)
    return fitted


if __name__ == "__main__":
    run("lightning-uq-box", {kind: functools.partial(fit, kind) for kind in METHODS})
