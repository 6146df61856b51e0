"""Both packages of Lightning as hosts: a fit, a query and an edit under ``pytorch_lightning``."""

import importlib
import importlib.metadata
from pathlib import Path

import lightning.pytorch as unified
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer, forget, influence
from lightning_influence.running.host.packages import (
    check_same_package,
    find_package,
    is_lightning,
    make_callback_class,
)

standalone = pytest.importorskip("pytorch_lightning")
PACKAGES = {"lightning.pytorch": unified, "pytorch_lightning": standalone}


def make_module(package):
    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

        def training_step(self, batch, batch_idx):
            self.log("loss", 0.0)
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    return Net()


def make_loader(n=24):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(n, 4, generator=generator), torch.arange(n) % 3), 6)


def make_data(package):
    class Data(package.LightningDataModule):
        def train_dataloader(self):
            return make_loader()

        def test_dataloader(self):
            return make_loader(6)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] / 2, batch[1]

    return Data()


def fit(package, folder, logger=False, **options):
    off = {"logger": logger, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = package.Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=folder, callbacks=[InfluenceCallback()], **off
    )
    module = make_module(package)
    trainer.fit(module, **options)
    return trainer, module


@pytest.mark.parametrize("method", ["ekfac", "auto"])
def test_both_packages_give_the_same_answer(tmp_path, method):
    answers = []
    for package in PACKAGES.values():
        trainer, module = fit(package, tmp_path, train_dataloaders=make_loader())
        answer = trainer.influence(module, make_loader(), make_loader(6), method=method)
        assert trainer.lightning_module is module
        answers.append(answer.scores)
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)


def test_a_datamodule_of_the_other_package(tmp_path):
    trainer, _ = fit(standalone, tmp_path, datamodule=make_data(standalone))
    answer = trainer.influence(datamodule=make_data(standalone), method="identity")
    assert answer.scores.shape == (6, 24)


def test_checkpoints_and_edits_of_the_other_package(tmp_path):
    trainer, module = fit(standalone, tmp_path, train_dataloaders=make_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    path = str(tmp_path / "end.ckpt")
    loaded = influence(trainer, module, make_loader(), make_loader(6), ckpt_path=path, method="ekfac")
    alone = InfluenceModule.from_checkpoint(path, make_module(standalone))
    torch.testing.assert_close(
        alone.scores(make_loader(), make_loader(6), method="ekfac").scores,
        loaded.scores,
        rtol=1e-4,
        atol=1e-7,
    )
    edit = forget(trainer, [0, 1], module, make_loader(), step=1.0)
    assert edit.report.touched > 0


def test_a_trainer_of_one_with_a_module_of_the_other_is_refused_in_one_sentence(tmp_path):
    trainer = InfluenceTrainer(default_root_dir=tmp_path, logger=False, enable_checkpointing=False)
    with pytest.raises(TypeError, match=r"Trainer of lightning\.pytorch with a module of pytorch_lightning"):
        trainer.influence(make_module(standalone), make_loader(), make_loader(6))


def test_packages_are_told_apart():
    assert find_package(make_module(standalone)) == "pytorch_lightning"
    assert find_package(unified.LightningModule) == "lightning.pytorch"
    assert find_package(nn.Linear(1, 1)) is None
    assert is_lightning(make_module(standalone), "LightningModule")
    assert not is_lightning(nn.Linear(1, 1), "LightningModule")
    check_same_package(unified.Trainer, unified.LightningModule)
    neighbour = type("LightningModule", (), {"__module__": "pytorch_lightning_bolts.models"})
    assert not is_lightning(neighbour, "LightningModule")


@pytest.mark.parametrize(("version", "of_both"), [("2.4.0", True), ("2.5.6", True), ("2.6.0", False)])
def test_old_versions_of_the_other_package_get_a_callback_of_their_own_class(monkeypatch, version, of_both):
    monkeypatch.setattr(importlib.metadata, "version", {"pytorch-lightning": version}.__getitem__)
    made = make_callback_class()
    assert issubclass(made, unified.Callback)
    assert issubclass(made, standalone.Callback) == of_both
    assert made.on_train_start is unified.Callback.on_train_start


def test_without_the_other_package_a_callback_is_as_ever(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert make_callback_class() is unified.Callback


def test_loggers_of_both_packages_show_tables_and_write_rows(tmp_path):
    """Each package has logger classes of its own, which share their names alone."""
    texts = []
    for name, package in PACKAGES.items():
        loggers = importlib.import_module(f"{name}.loggers")
        boards = [loggers.TensorBoardLogger(tmp_path, name=name), loggers.CSVLogger(tmp_path, name=name)]
        trainer, module = fit(package, tmp_path, logger=boards, train_dataloaders=make_loader())
        trainer.influence(module, make_loader(), make_loader(6), method="ekfac")
        events = EventAccumulator(boards[0].log_dir).Reload()
        [table] = events.Tensors("influence/top/text_summary")
        texts.append(table.tensor_proto.string_val)
        assert "influence/score_max" in Path(boards[1].log_dir, "metrics.csv").read_text()
        assert Path(boards[0].log_dir, "influence", "attributions.safetensors").exists()
    assert texts[0] == texts[1]
