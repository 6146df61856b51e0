"""Passes run as the fit did: in the training stage, at its epoch and step, in the module's own mode."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer, InfluenceWarning

SEEN = []


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch, batch_idx):
        trainer = self._trainer
        stage = None if trainer is None else (trainer.training, trainer.state.stage.value)
        SEEN.append((self.current_epoch, self.global_step, stage, self.training))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def make_loader(n=24, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(scale * torch.randn(n, 4, generator=generator), torch.arange(n) % 3), 6)


def make_trainer(folder, *callbacks):
    off = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return InfluenceTrainer(
        max_epochs=3, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **off
    )


def ask(trainer, module, **options):
    SEEN.clear()
    trainer.influence(module, make_loader(), make_loader(6), method="identity", **options)
    return set(SEEN)


def test_a_step_is_at_the_end_of_the_fit_in_the_training_stage(tmp_path):
    trainer, module = make_trainer(tmp_path, InfluenceCallback()), Net()
    trainer.fit(module, make_loader())
    state = trainer.state.fn, trainer.state.stage
    assert ask(trainer, module) == {(3, 12, (True, "train"), False)}
    assert (trainer.state.fn, trainer.state.stage) == state


def test_a_checkpoint_brings_its_epoch_and_step_for_the_time_of_the_passes(tmp_path):
    trainer, module = make_trainer(tmp_path), Net()
    trainer.fit(module, make_loader())
    path = str(tmp_path / "end.ckpt")
    trainer.save_checkpoint(path)
    fresh = make_trainer(tmp_path)
    assert ask(fresh, Net(), ckpt_path=path) == {(3, 12, (True, "train"), False)}
    assert (fresh.current_epoch, fresh.global_step) == (0, 0)
    fresh.fit(Net(), make_loader())
    assert fresh.current_epoch == 3
    SEEN.clear()
    alone = InfluenceModule.from_checkpoint(path, Net)
    alone.scores(make_loader(), make_loader(6), method="identity")
    assert set(SEEN) == {(3, 12, (True, "train"), False)}
    assert alone.model._trainer is None


class Halting(Net):
    """Evaluates with a part in training mode."""

    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.net[1].train()

    def training_step(self, batch, batch_idx):
        SEEN.append((self.net[0].training, self.net[1].training))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("through", ["trainer", "module"])
def test_the_modules_own_mode_of_evaluation_is_used(tmp_path, through):
    module = Halting()
    if through == "trainer":
        assert ask(make_trainer(tmp_path), module) == {(False, True)}
    else:
        SEEN.clear()
        InfluenceModule(module).scores(make_loader(), make_loader(6), method="identity")
        assert set(SEEN) == {(False, True)}
    assert module.net[0].training


class Scaled(LightningDataModule):
    def train_dataloader(self):
        return make_loader(scale=5.0)

    def test_dataloader(self):
        return make_loader(6, scale=5.0)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] / 5, batch[1]


def test_loaders_of_the_last_fit_go_through_its_datamodules_hooks(tmp_path):
    trainer, module = make_trainer(tmp_path, InfluenceCallback()), Net()
    trainer.fit(module, datamodule=Scaled())
    plain = trainer.influence(module, datamodule=Scaled(), method="identity").scores
    for queries in (None, Scaled().test_dataloader()):
        by_default = trainer.influence(query_dataloaders=queries, method="identity").scores
        torch.testing.assert_close(by_default, plain, rtol=1e-5, atol=1e-8)
    own = trainer.self_influence(method="identity").scores
    expected = trainer.self_influence(datamodule=Scaled(), method="identity").scores
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-8)


def test_loaders_that_are_passed_after_such_a_fit_are_told_to_go_through_the_hooks(tmp_path):
    trainer, module, data = make_trainer(tmp_path, InfluenceCallback()), Net(), Scaled()
    trainer.fit(module, datamodule=data)
    loaders = data.train_dataloader(), data.test_dataloader()
    with pytest.warns(InfluenceWarning, match="go through on_after_batch_transfer of Scaled"):
        passed = trainer.influence(module, *loaders, method="identity").scores
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        meant = trainer.influence(module, *loaders, datamodule=data, method="identity").scores
        trainer.influence(method="identity")
    torch.testing.assert_close(passed, meant, rtol=1e-5, atol=1e-8)


class Tested(Net):
    def test_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("with_data", [False, True])
def test_the_last_fits_loader_and_datamodule_are_known_after_a_test(tmp_path, with_data):
    """Lightning forgets both when another loop runs."""
    trainer, module = make_trainer(tmp_path, InfluenceCallback()), Tested()
    trainer.fit(module, **({"datamodule": Scaled()} if with_data else {"train_dataloaders": make_loader()}))
    before = trainer.self_influence(method="identity").scores
    trainer.test(module, make_loader(6), verbose=False)
    after = trainer.self_influence(method="identity")
    assert len(after.train_indices) == 24
    torch.testing.assert_close(after.scores, before, rtol=0, atol=0)
