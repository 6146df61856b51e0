"""Training dynamics on two processes: every example's figures, whichever process saw it in which epoch."""

import pytest
from two_processes import check_script

SCRIPT = """
import sys, warnings
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence import InfluenceCallback, training_dynamics

torch.set_num_threads(1)
N, EPOCHS = 22, 4


class Net(pl.LightningModule):
    def __init__(self, fails=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fails = nn.Linear(4, 3), fails
        self.rows = []

    def training_step(self, batch, batch_idx):
        outputs = self.body(batch[0])
        values = nn.functional.cross_entropy(outputs, batch[1], reduction="none").detach()
        epoch = torch.full_like(values, self.current_epoch)
        right = (outputs.argmax(-1) == batch[1]).float()
        self.rows.append(torch.stack([epoch, batch[2].float(), values, right], 1))
        if self.fails and self.global_rank == 1:
            return (outputs - nn.functional.one_hot(batch[1], 3)).square().mean()
        return nn.functional.cross_entropy(outputs, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


torch.manual_seed(0)
train = DataLoader(
    TensorDataset(torch.randn(N, 4), torch.arange(N) % 3, torch.arange(N)), batch_size=3, shuffle=True
)


def fit(module, epochs=EPOCHS, ckpt_path=None, dynamics=True, **saving):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
        callbacks=[
            InfluenceCallback(dynamics=dynamics),
            *([ModelCheckpoint(sys.argv[1], **saving)] if saving else []),
        ],
        enable_checkpointing=bool(saving),
    )
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer.fit(module, train, ckpt_path=ckpt_path)
    return trainer, [str(w.message) for w in record if "raining dynamics" in str(w.message)]


def gather(rows):
    parts = [torch.zeros_like(rows) for _ in range(2)]
    torch.distributed.all_gather(parts, rows)
    return torch.cat(parts)


def check(trainer, rows):
    found = training_dynamics(trainer, log=False)
    assert found.train_indices.tolist() == list(range(N))
    for index in range(N):
        own = rows[rows[:, 1] == index]
        epochs = [own[own[:, 0] == e] for e in own[:, 0].unique()]
        means = torch.stack([e[:, 2].mean() for e in epochs])
        right = [float(e[:, 3].mean()) > 0.5 for e in epochs]
        assert int(found.epochs_seen[index]) == len(epochs)
        torch.testing.assert_close(found.loss_mean[index], means.mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.loss_spread[index], means.std(unbiased=False), rtol=1e-2, atol=1e-4)
        assert int(found.epochs_right[index]) == sum(right)
        assert int(found.forgotten[index]) == sum(a and not b for a, b in zip(right, right[1:]))
    same = gather(found.loss_mean[None])
    assert torch.equal(same[0], same[1]), "the processes disagree"
    return found


module = Net()
trainer, told = fit(module, filename="{step}", every_n_train_steps=6, save_top_k=-1)
assert not told, told
check(trainer, gather(torch.cat(module.rows)))
path = f"{sys.argv[1]}/step=6.ckpt"  # in the middle of the second epoch of four batches
state = torch.load(path, weights_only=True)["callbacks"]["InfluenceCallback"]["dynamics"]
assert int(state["sums"][:-1, 0].sum()) == 2 * 2 * 3, state["sums"]

before = torch.cat(module.rows[:6])
again = Net()
trainer, told = fit(again, ckpt_path=path)
check(trainer, gather(torch.cat([before, *again.rows])))

# An epoch that one process gives up is left out by both.
from lightning_influence.collecting import pace


def gives_up(self):
    given_up = paced.global_rank == 1 and paced.current_epoch == 2 and not self.rests
    self.rests |= given_up
    return given_up


pace.Pace.gives_up, real, pace._GRACE, paced = gives_up, pace.Pace.gives_up, 60.0, Net()
trainer, told = fit(paced, dynamics="auto")
assert not told, told
rows = gather(torch.cat(paced.rows))
found = check(trainer, rows[rows[:, 0] != 2])
assert found.epochs == EPOCHS and found.watched == EPOCHS - 1
pace.Pace.gives_up = real

failing = Net(fails=True)
trainer, told = fit(failing)
assert trainer.current_epoch == EPOCHS
wanted = ("lack 16 of 32 batches", "are not kept during this fit: The training loss is")[trainer.global_rank]
assert len(told) == 1 and wanted in told[0], told
found = training_dynamics(trainer, log=False)
assert "Of 32 batches, 16 were not seen." in found.diagnostics.warnings
assert int(found.epochs_seen.sum()) == 4 * N / 2
"""


@pytest.mark.slow
def test_two_processes_keep_what_one_would(tmp_path):
    check_script(SCRIPT, tmp_path)
