"""Activation checkpointing, of either kind, changes no answer."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint

from lightning_influence import InfluenceModule


class Net(LightningModule):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x):
        hidden = self.first(x)
        if self.reentrant is None:
            return self.head(torch.tanh(self.body(hidden)))
        part = nn.Sequential(self.body, nn.Tanh())
        return self.head(checkpoint.checkpoint(part, hidden, use_reentrant=self.reentrant))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.grid
@pytest.mark.parametrize("method", ["identity", "ekfac", "auto", "hessian"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_are_covered(method, reentrant):
    plain, saved = Net(None).double(), Net(reentrant).double()
    saved.load_state_dict(plain.state_dict())
    batches = [(torch.randn(5, 4).double(), torch.arange(5) % 3) for _ in range(2)]
    kept = checkpoint.CheckpointFunction
    found = InfluenceModule(saved).scores(batches, batches, method=method, damping=0.1)
    expected = InfluenceModule(plain).scores(batches, batches, method=method, damping=0.1)
    assert found.diagnostics.parameters_covered == 1.0
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-7, atol=1e-10)
    assert checkpoint.CheckpointFunction is kept
