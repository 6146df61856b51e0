"""``trainer.forget`` and ``trainer.relabel``: the edits made without a Trainer, and what a Trainer adds."""

import csv

import lightning
import pytest
import torch
from edit_models import blobs, fitted, of_class, quiet, train
from influence_models import Net, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_influence import (
    InfluenceCallback,
    InfluenceModule,
    InfluenceTrainer,
    ParameterEdit,
    forget,
    relabel,
)
from lightning_influence.support.errors import InfluenceError, UnsupportedDataError, UnsupportedTrainerError

FORGET = {"ratio": 0.3}
RELABEL = {"ratio": 0.3, "linearisations": 4}


def trained(*callbacks, **options):
    torch.manual_seed(0)
    host, module = trainer(*callbacks, **options), Net(16)
    host.fit(module, train())
    return host, module


def same(first, second):
    assert first.changes.keys() == second.changes.keys()
    for name, change in first.changes.items():
        assert torch.equal(change.index, second.changes[name].index)
        torch.testing.assert_close(change.after, second.changes[name].after, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [InfluenceTrainer, lightning.Trainer])
def test_every_way_to_ask_gives_the_same_edit(kind):
    module = fitted()
    host = trainer(kind=kind)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    alone = InfluenceModule(module)
    with quiet():
        same(
            forget(host, of_class(0), module, train(), **FORGET), alone.forget(of_class(0), train(), **FORGET)
        )
        same(
            relabel(host, of_class(2), 0, module, train(), **RELABEL),
            alone.relabel(of_class(2), 0, train(), **RELABEL),
        )
        if kind is InfluenceTrainer:
            same(host.forget([1, 4], module, train(), step=2.0), alone.forget([1, 4], train(), step=2.0))
            same(
                host.relabel([1, 4], [0, 2], module, train(), **RELABEL),
                alone.relabel([1, 4], [0, 2], train(), **RELABEL),
            )
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(m._forward_hooks for m in module.modules())


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return train()


def test_datamodules_and_the_loader_of_the_last_fit():
    host, module = trained()
    with quiet():
        edits = [
            host.forget(of_class(0), **FORGET),
            host.forget(of_class(0), datamodule=Data(), **FORGET),
            host.forget(of_class(0), module, train(), **FORGET),
        ]
    same(edits[0], edits[1])
    same(edits[0], edits[2])


def test_weights_of_a_checkpoint_are_edited(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="loss", mode="max", save_top_k=1)
    host, module = trained(checkpoint, default_root_dir=tmp_path)
    best = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert not torch.equal(best["body.0.weight"], module.body[0].weight)
    with quiet():
        for path in ("best", checkpoint.best_model_path):
            edit = host.forget(of_class(0), ckpt_path=path, train_dataloaders=train(), **FORGET)
            torch.testing.assert_close(dict(module.state_dict()), dict(best))
            change = edit.changes["body.0.weight"]
            torch.testing.assert_close(change.before, best["body.0.weight"].flatten()[change.index])


def test_an_edited_model_is_an_ordinary_checkpoint(tmp_path):
    host, module = trained()
    with quiet(), host.forget(of_class(0), **FORGET):
        expected = {name: value.clone() for name, value in module.state_dict().items()}
        host.save_checkpoint(tmp_path / "edited.ckpt")
    again = Net.load_from_checkpoint(tmp_path / "edited.ckpt")
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name])
    assert not torch.equal(again.body[0].weight, module.body[0].weight)
    x, y = blobs().tensors
    assert float((again.eval()(x[y == 0]).argmax(1) == 0).float().mean()) < 0.1


def test_the_recorded_weight_decay_counts(tmp_path):
    """From the callback, or from the file it is in."""
    host, module = trained(InfluenceCallback(every_n_steps=1))
    host.save_checkpoint(tmp_path / "a.ckpt")
    options = {"step": "theory", "ratio": 0.3, "damping": 0.1}
    with quiet():
        alone = InfluenceModule(module)
        recorded, without = host.forget(of_class(0), **options), alone.forget(of_class(0), train(), **options)
        same(recorded, alone.forget(of_class(0), train(), weight_decay=1e-3, **options))
        other = trainer()
        same(recorded, other.forget(of_class(0), Net(16), train(), ckpt_path=tmp_path / "a.ckpt", **options))
    assert recorded.report.norm != without.report.norm


def test_reports_are_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")]
    host, module = trained(logger=boards, default_root_dir=tmp_path, log_every_n_steps=1)
    with quiet():
        edit = host.forget(of_class(0), name="zeros", **FORGET)
        host.relabel([0], 1, log=False, **RELABEL)
    for board in boards:
        board.finalize("success")
    events = EventAccumulator(boards[0].log_dir)
    events.Reload()
    [scalar] = events.Scalars("zeros/loss_edited_after")
    assert scalar.value == pytest.approx(edit.report.edited.after, rel=1e-5)
    tags = events.Tags()
    assert "zeros/parameters_changed" in tags["scalars"]
    assert any("zeros/diagnostics" in tag for tag in tags["tensors"])
    assert not any("relabel" in tag for tag in tags["scalars"])
    with open(f"{boards[1].log_dir}/metrics.csv") as file:
        assert "zeros/loss_kept_after" in next(csv.reader(file))
    stored = ParameterEdit.load(tmp_path / "tb" / "version_0" / "zeros" / "edit.safetensors", module)
    same(stored, edit)


def test_what_is_refused(tmp_path):
    host, module = trained()
    with pytest.raises(ValueError, match="new_targets=None"):
        host.relabel([0], None)
    with pytest.raises(ValueError, match=r"Got ratio=0; accepted"):
        host.forget([0], ratio=0)
    with pytest.raises(TypeError, match=r"Got layers='body'.*layers=\['body'\]"):
        host.forget([0], layers="body")
    with pytest.raises(ValueError, match="nothing to edit"):
        host.forget([])
    with pytest.raises(ValueError, match="All 60 training examples"):
        host.forget(range(60))
    with pytest.raises(UnsupportedDataError, match="Examples 99 are not among"):
        host.forget([99])
    with pytest.raises(InfluenceError, match=r"new targets are the old ones"):
        host.relabel(of_class(0), 0, step="theory")
    assert host.lightning_module is module


def test_several_processes_are_refused():
    """Before any process starts; a running pair of processes is in test_ddp."""
    host = trainer(devices=2, strategy="ddp")
    with pytest.raises(UnsupportedTrainerError, match=r"has 2 processes; edits run on one.*devices=1"):
        host.forget([0], Net(16), train())
