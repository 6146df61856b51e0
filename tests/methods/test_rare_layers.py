"""A layer that only some batches use: what they did not use has a gradient of zero, and counts."""

from __future__ import annotations

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_influence import InfluenceModule


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.rare = nn.Linear(3, 2), nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        use = batch[0][:, :1] > 1.5
        outputs = self.body(batch[0])
        if bool(use.any()):
            outputs = outputs + use * self.rare(batch[0])
        return functional.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("method", ["diagonal", "ekfac"])
def test_second_moments_do_not_depend_on_the_batches(method):
    torch.manual_seed(1)
    module = Net().double()
    x = torch.randn(8, 3, dtype=torch.float64).clamp(-1, 1)
    x[5, 0] = 2.0
    data = torch.utils.data.TensorDataset(x, torch.arange(8) % 2)
    traces = []
    for batch in (1, 3, 8):
        own = InfluenceModule(module)
        loader = torch.utils.data.DataLoader(data, batch)
        diagnostics = own.scores(
            loader, loader, method=method, fisher="exact", damping="heuristic"
        ).diagnostics
        traces.append(diagnostics.damping["rare"])  # a share of the mean second moment
        assert diagnostics.damping["body"] == pytest.approx(
            0.1
            * InfluenceModule(module)
            .scores(loader, loader, method="exact", damping="heuristic")
            .diagnostics.damping["body"]
            * 10
        )
    assert traces[0] > 0
    assert traces[1:] == pytest.approx(traces[:1] * 2, rel=1e-12)
