"""An optimizer as a user would make it known to the training record, from outside of the package."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceTrainer
from lightning_influence.curvature.training_record import (
    OptimizerRule,
    find_optimizer_rule,
    register_optimizer,
)

GENERATOR = torch.Generator().manual_seed(3)
DATA = TensorDataset(torch.randn(12, 3, generator=GENERATOR), torch.randint(0, 2, (12,), generator=GENERATOR))
STEPS = 9  # three epochs of three batches
UNRESOLVED = 4.0  # the c of the rule for the damping of a run


class Scaled(torch.optim.Optimizer):
    """Divides gradients by a scale of each parameter, and decays weights by ``pull`` outside of it."""

    def __init__(self, parameters, gain: float, pull: float) -> None:
        super().__init__(parameters, {"gain": gain, "pull": pull})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["scale"] = torch.full_like(p, 5.0)
                p -= group["gain"] * (p.grad / self.state[p]["scale"] + group["pull"] * p)
        return loss


class Unknown(Scaled):
    """A subclass is read as its nearest registered base."""


class Net(LightningModule):
    def __init__(self, optimizer=Scaled) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.optimizer = nn.Linear(3, 2), optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), 0.05, 0.01)


def fit(optimizer=Scaled):
    trainer = InfluenceTrainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[InfluenceCallback()],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = Net(optimizer)
    trainer.fit(model, DataLoader(DATA, 4))
    return trainer.influence(model, DataLoader(DATA, 4), DataLoader(DATA, 4), method="exact").diagnostics


def test_before_it_is_registered_the_damping_of_the_run_is_not_known():
    assert find_optimizer_rule(Scaled(Net().parameters(), 0.05, 0.01)) is None
    assert "the damping of a run with Scaled is not known" in fit().damping_origin


@pytest.fixture
def registered(monkeypatch):
    """Register a rule, and let go of it after the test."""
    monkeypatch.setattr("lightning_influence.curvature.training_record._RULES", {})

    @register_optimizer(Scaled)
    class ScaledRule(OptimizerRule):
        family = "adamw"

        def read_rate(self, group):
            return group["gain"]

        def read_weight_decay(self, group):
            return group["pull"]

        def read_metric(self, state, group):
            return state.get("scale")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("optimizer", [Scaled, Unknown])
def test_rate_decay_and_metric_decide_the_damping(optimizer):
    found = fit(optimizer)
    assert found.damping == {"net": pytest.approx(5.0 * (0.01 + UNRESOLVED / (STEPS * 0.05)), rel=1e-5)}
    assert f"from {STEPS} steps" in found.damping_origin
