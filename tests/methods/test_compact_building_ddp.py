"""The compact coarse space on two processes: that of all examples, whoever visits them."""

from __future__ import annotations

import pytest
from two_processes import check_script

SCRIPT = """
import sys, warnings
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence import InfluenceModule, InfluenceTrainer

torch.set_num_threads(1)
warnings.simplefilter("ignore")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


torch.manual_seed(0)
x, y = torch.randn(61, 40, dtype=torch.float64), torch.arange(61) % 3
module = Net().double()
trainer = InfluenceTrainer(
    max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
)
loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
queries = DataLoader(TensorDataset(x[:3] + 0.1, y[:3]), batch_size=3)
trainer.fit(module, loader)
assert trainer.world_size == 2
numel = sum(p.numel() for p in module.parameters())
for budget, steps in ((12, 0), (40, 0), (40, 2)):
    options = {"method": "auto", "damping": 0.3, "max_steps": steps, "memory_budget": budget * 8 * numel,
               "low_rank_tolerance": 0.0, "tolerance": 1e-3, "factors": "refit"}
    found = trainer.influence(module, loader, queries, **options)
    del options["factors"]
    alone = InfluenceModule(module).scores(DataLoader(TensorDataset(x, y), batch_size=16), queries, **options)
    assert found.diagnostics.extra["coarse_rank"] == alone.diagnostics.extra["coarse_rank"]
    assert found.diagnostics.extra["coarse_space"] == alone.diagnostics.extra["coarse_space"]
    # More examples than a side is wide: bases of null spaces would be arbitrary.
    torch.testing.assert_close(found.diagnostics.residuals, alone.diagnostics.residuals, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.scores, alone.scores, rtol=1e-6, atol=1e-9)
"""


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path):
    check_script(SCRIPT, tmp_path)
