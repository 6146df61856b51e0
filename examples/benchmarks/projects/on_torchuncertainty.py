"""Routines around small networks: several losses, networks of many kinds of layers, mixup."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from harness import QUIET, Draws, Fitted, Later, collate_singles, run

# isort: split


import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate
from torch_uncertainty import TUTrainer
from torch_uncertainty.layers.bayesian.sampler import TrainableDistribution
from torch_uncertainty.losses import DECLoss, DistributionNLLLoss, ELBOLoss, FocalLoss
from torch_uncertainty.models.classification.lenet import bayesian_lenet, lenet, packed_lenet
from torch_uncertainty.routines import ClassificationRoutine, RegressionRoutine
from torch_uncertainty.transforms import RepeatTarget
from torch_uncertainty.transforms.mixup import Mixup

from lightning_influence.model.training_mode import own_modules_in_training

COUNT, EPOCHS, CLASSES = 64, 3, 4


def _classify(net: nn.Module, loss: nn.Module, **options: Any) -> pl.LightningModule:
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    return ClassificationRoutine(net, CLASSES, loss, optim_recipe=adam, **options)


def _bayes() -> pl.LightningModule:
    net = bayesian_lenet(1, CLASSES)
    return _classify(
        net, ELBOLoss(net, nn.CrossEntropyLoss(), kl_weight=1e-3, num_samples=1), is_ensemble=True
    )


def _regress() -> pl.LightningModule:
    from torch_uncertainty.layers.distributions import NormalLinear

    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), NormalLinear(nn.Linear, event_dim=1, in_features=16))
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    return RegressionRoutine(net, 1, DistributionNLLLoss(), dist_family="normal", optim_recipe=adam)


ROUTINES: dict[str, Any] = {
    "LeNet, cross-entropy": lambda: _classify(lenet(1, CLASSES), nn.CrossEntropyLoss()),
    "LeNet, focal": lambda: _classify(lenet(1, CLASSES), FocalLoss(gamma=2)),
    "LeNet, evidential": lambda: _classify(
        lenet(1, CLASSES), DECLoss(annealing_step=10, loss_type="mse", reg_weight=0.1)
    ),
    "LeNet, mixup": lambda: _classify(
        lenet(1, CLASSES), nn.CrossEntropyLoss(), mixup_params={"mixtype": "mixup", "mixup_alpha": 0.2}
    ),
    "Packed LeNet": lambda: _classify(
        packed_lenet(1, CLASSES, num_estimators=2, alpha=2, gamma=1), nn.CrossEntropyLoss(), is_ensemble=True,
        format_batch_fn=RepeatTarget(2),
    ),
    "Bayesian LeNet": _bayes,
    "Normal regression": _regress,
}  # fmt: skip


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Let weights be the same draw each time."""
    sample = TrainableDistribution.sample

    def draw(self: Any) -> Tensor:
        noise = torch.randn(self.mu.shape, generator=torch.Generator().manual_seed(0))
        self.sigma = torch.log1p(torch.exp(self.rho))
        self.weight = self.mu + self.sigma * noise
        return self.weight

    TrainableDistribution.sample = draw
    try:
        yield
    finally:
        TrainableDistribution.sample = sample


def _likelihood(module: Any, batch: Any) -> Tensor:
    """Return the part of the loss that goes with the data, of a network drawn once as in training."""
    with own_modules_in_training(module):
        return functional.cross_entropy(module.model(batch[0]), batch[1])


def _mixed(draws: Draws, loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield each example of a loader mixed as it was in the pass."""
    for images, _ in loader:
        _, mixed = draws.find(images)
        yield from zip(*(part.split(1) for part in mixed), strict=True)


def _compute_mixed_loss(module: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(module.model(batch[0]), batch[1])


def fit(kind: str, callbacks: list[Any]) -> Fitted:
    """Train as in the project's tutorials."""
    pl.seed_everything(0)
    images = torch.randn(COUNT, 1, 28, 28)
    labels = torch.arange(COUNT) % CLASSES
    images += labels[:, None, None, None] * torch.sin(torch.arange(28.0))
    points = TensorDataset(torch.randn(COUNT, 5), torch.randn(COUNT)) if kind == "Normal regression" else None
    points = points or TensorDataset(images, labels)
    module = ROUTINES[kind]()
    loader = DataLoader(points, batch_size=16, shuffle=True)
    trainer = TUTrainer(max_epochs=EPOCHS, callbacks=callbacks, **QUIET)
    trainer.fit(module, loader)
    singles = collate_singles(points, default_collate, 2)
    queries = DataLoader(Subset(points, range(12)), batch_size=8)
    fitted = Fitted(trainer, module, loader, queries, EPOCHS, singles, singles[:12])
    if kind == "Bayesian LeNet":
        fitted.loss, fitted.quiet = _likelihood, same_draws
    if "mixup" in kind:
        draws, in_order = Draws(Mixup, "forward"), DataLoader(points, batch_size=16)
        fitted.train_singles = Later(lambda: _mixed(draws, in_order))
        fitted.query_singles = Later(lambda: _mixed(draws, queries))
        fitted.loss, fitted.quiet, fitted.draws = _compute_mixed_loss, draws.keep, draws
    return fitted


if __name__ == "__main__":
    run("torch-uncertainty", {kind: functools.partial(fit, kind) for kind in ROUTINES})
