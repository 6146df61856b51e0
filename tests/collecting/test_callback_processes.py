"""Collecting that fails on one of two processes: both go on as without the callback, in step."""

from __future__ import annotations

import pytest
from two_processes import check_script

SCRIPT = """
import sys, warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence import InfluenceCallback
from lightning_influence.support.errors import InfluenceWarning

torch.set_num_threads(1)


class Net(pl.LightningModule):
    def __init__(self, first, rank):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.expert = nn.Linear(4, 3), nn.Linear(4, 3)
        self.first, self.rank = first, rank

    def training_step(self, batch, batch_idx):
        outputs = self.body(batch[0])
        few = self.global_step >= self.first and self.global_rank == self.rank
        rows = torch.arange(2 if few else len(outputs))
        return nn.functional.cross_entropy(outputs.index_add(0, rows, self.expert(batch[0][rows])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


torch.manual_seed(0)
train = DataLoader(TensorDataset(torch.randn(32, 4), torch.arange(32) % 3), batch_size=4, shuffle=True)


def fit(module, *callbacks):
    trainer = pl.Trainer(
        max_epochs=6, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=sys.argv[1], callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    torch.manual_seed(1)
    trainer.fit(module, train)
    return trainer


for first in (0, 1, 3, 9, 23):  # of 24 steps: in the first, in covariances, in squares, in the last
    for saves in (False, True):
        callback, module, plain = InfluenceCallback(every_n_steps=1), Net(first, 1), Net(first, 1)
        folder = f"{sys.argv[1]}/{first}"
        further = [ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1)] if saves else []
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            trainer = fit(module, callback, *further)
        told = [str(w.message) for w in record if issubclass(w.category, InfluenceWarning)]
        fit(plain)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters()))
        assert len(told) == 1, told
        reason = "failed on another process" if trainer.global_rank == 0 else "Layer 'expert' was called"
        assert told[0].startswith("Nothing is collected during this fit: ") and reason in told[0], told
        assert not callback.factors.layers and callback.num_collected == 0 and callback.record is None
callback = InfluenceCallback(every_n_steps=1)
trainer = fit(Net(99, 1), callback)
assert callback.factors.has_squares and callback.num_collected == 24
"""


@pytest.mark.slow
def test_failure_on_one_process_stops_all_at_the_same_step(tmp_path):
    check_script(SCRIPT, tmp_path)


UNEQUAL = """
import sys, warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence import InfluenceCallback
from lightning_influence.collecting import callback as watched

torch.set_num_threads(1)


class Net(pl.LightningModule):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 32), nn.Linear(32, 3)
        self.kind = kind

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.kind == "shapes" and self.global_rank == 1:  # longer sequences: more to multiply
            x = x[:, None].expand(-1, 4000, -1)
        loss = nn.functional.cross_entropy(self.head(self.body(x).tanh()).flatten(1)[:, :3], y)
        broken = {"first": (0,), "first two": (0, 1), "some": (0, 3, 4, 11)}.get(self.kind, ())
        if self.global_rank == 1 and self.global_step in broken:
            loss = loss * float("nan")
        return loss

    def configure_gradient_clipping(self, *arguments, **options):
        for p in self.parameters():
            p.grad.nan_to_num_()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


torch.manual_seed(0)
train = DataLoader(TensorDataset(torch.randn(32, 4), torch.arange(32) % 3), batch_size=4, shuffle=True)


def fit(kind, callback=None):
    torch.manual_seed(1)
    module = Net(kind)
    saves = ModelCheckpoint(f"{sys.argv[1]}/{kind}{callback is None}", every_n_train_steps=5, save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=8, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[saves] + [callback] * (callback is not None),
    )
    torch.manual_seed(2)
    trainer.fit(module, train)
    return trainer, module


warnings.simplefilter("ignore")
for kind in ("shapes", "first", "first two", "some"):
    for overhead in (0.05, 0.9):
        callback = InfluenceCallback(overhead=overhead, log_statistics=overhead < 0.5)
        trainer, module = fit(kind, callback)
        _, plain = fit(kind)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters())), kind
        schedule = callback.state_dict()["collector"]["schedule"]
        seen = [None, None]
        torch.distributed.all_gather_object(seen, {**schedule, "collected": callback.num_collected})
        assert seen[0] == seen[1], (kind, seen)
        assert callback.factors.layers and callback.num_collected > (overhead > 0.5), kind

# What cannot even begin on one process does not leave the other waiting for it.
real = watched.find_layers
watched.find_layers = lambda module, *args, **options: (
    1 / 0 if module.global_rank == 1 else real(module, *args, **options)
)
with warnings.catch_warnings(record=True) as record:
    warnings.simplefilter("always")
    trainer, _ = fit("plain", callback := InfluenceCallback())
told = [str(w.message) for w in record if "Nothing is collected" in str(w.message)]
reason = ("Another process cannot collect", "ZeroDivisionError")[trainer.global_rank]
assert len(told) == 1 and reason in told[0], told
assert callback.num_collected == 0
"""


@pytest.mark.slow
def test_processes_with_unequal_batches_stay_in_step(tmp_path):
    check_script(UNEQUAL, tmp_path)
