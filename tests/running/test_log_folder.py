"""The folder in which files of a run are written, whatever logger it has."""

from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger

from lightning_influence.running.host.trainer import find_log_folder


class Service(Logger):
    """A logger of a service: it has no folder, and a version once its run has begun."""

    name, version = "project", None

    @property
    def experiment(self):
        self.version = "a1b2"

    def log_metrics(self, metrics, step=None):
        raise AssertionError("not asked for")

    log_hyperparams = log_metrics


class Unreachable(Service):
    @property
    def experiment(self):
        raise ConnectionError("no route to host")


class WithFolder(Service):
    save_dir = "theirs"


def find(folder, logger):
    return find_log_folder(Trainer(logger=logger, default_root_dir=folder, accelerator="cpu"))


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_folder_of_a_logger_that_has_one_for_each_run(tmp_path, kind):
    logger = kind(tmp_path / "logs", name="mine")
    assert find(tmp_path / "other", [logger, Service()]) == str(tmp_path / "logs" / "mine" / "version_0")


def test_the_folder_of_the_checkpoints_for_a_logger_that_has_none(tmp_path):
    assert Path(find(tmp_path, Service())) == tmp_path / "project" / "a1b2"
    assert Path(find(tmp_path, WithFolder())) == Path("theirs", "project", "a1b2")


def test_a_service_that_cannot_be_reached_does_not_end_a_question(tmp_path):
    assert Path(find(tmp_path, Unreachable())) == tmp_path


def test_no_folder_without_a_logger(tmp_path, monkeypatch):
    assert find(tmp_path, False) is None
    assert find(tmp_path, DummyLogger()) is None
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    assert find(tmp_path, Service()) is None
