"""Everything that is logged, in the packages themselves: written by a run, read back from the disk, compared.

``pip install -e ".[test,loggers]" && python -m pytest -m loggers tests/loggers``. Nothing is sent anywhere:
MLflow writes to a data base, Weights & Biases and Comet are offline.
"""

import io
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from written import Written, read_comet, read_csv, read_mlflow, read_tensorboard, read_wandb

from lightning_influence import Attributions, InfluenceCallback, InfluenceTrainer, Labels
from lightning_influence.results.loggers import log_attributions, log_media
from lightning_influence.results.plots import figure_to_array
from lightning_influence.support.errors import InfluenceWarning

pytestmark = pytest.mark.loggers

N, QUERIES = 48, 4
# What is shown as a picture needs no more digits than a file: TensorBoard keeps float32, and four digits of
# what it shows as text; the others keep all that a float has.
DIGITS = {"tensorboard": 1e-6, "csv": 0.0, "mlflow": 0.0, "wandb": 0.0, "comet": 0.0}
ANSWERS = ("influence", "groups", "self_influence", "training_dynamics", "suspects", "shown", "map")
EDITS = ("forget", "relabel")
QUIET = {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    # The argument of Lightning's CometLogger would switch Comet off altogether.
    "COMET_START_ONLINE": "false",
    "COMET_LOGGING_CONSOLE": "ERROR",
    "COMET_AUTO_OUTPUT_LOGGING": "false",
}


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Memory(Logger):
    """The reference: what a logger is given, kept as it is."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.kept = Written()

    def log_hyperparams(self, params):
        """Not of interest."""

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.kept.metrics[name].append((step, float(value)))


@log_media.register
def _(logger: Memory, media):
    for key, table in media.tables().items():
        logger.kept.tables[f"{media.name}/{key}"] = table
    for key, figure in media.figures.items():
        logger.kept.pictures[f"{media.name}/{key}"] = figure_to_array(figure)
    for path in media.files:
        logger.kept.files[f"{media.name}/{path.name}"] = path.read_bytes()


def make_data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 6, generator=generator)
    data = TensorDataset(inputs, inputs[:, :3].argmax(1))
    return DataLoader(data, 8, shuffle=True), DataLoader(TensorDataset(*data[:QUERIES]), QUERIES)


def fit(loggers, **settings):
    torch.manual_seed(0)
    callback = InfluenceCallback(dynamics=True, overhead=1.0)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = InfluenceTrainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[callback],
        logger=loggers,
        log_every_n_steps=2,
        **quiet,
        **settings,
    )
    trainer.fit(Net(), make_data()[0])
    return trainer


def ask(trainer):
    """Every question and edit whose answer is logged, and pictures along."""
    texts = Labels(train=[f"Übung <b>{n}</b> & Co" for n in range(N)], query=["Frage"] * QUERIES)
    _, queries = make_data()
    answer = trainer.influence(query_dataloaders=queries, labels=texts)
    groups = {"aggregate": ["a", "a", "b", "b"], "train_groups": ["even", "odd"] * (N // 2)}
    trainer.influence(query_dataloaders=queries, name="groups", method="ekfac", **groups)
    trainer.self_influence()
    dynamics = trainer.training_dynamics()
    trainer.suspects()
    trainer.forget([0, 1, 2], step="theory")
    trainer.relabel([3, 4], [0, 1], step="theory")
    for name, result in (("shown", answer), ("map", dynamics)):
        log_attributions(
            trainer.loggers, result, step=trainer.global_step, name=name, figures={"picture": draw_noise()}
        )


def draw_noise():
    """A picture that is the same however often it is drawn, which no layout moves."""
    figure = Figure(figsize=(2, 1), dpi=50)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.random.default_rng(0).random((50, 100)), interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    return figure


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """For each package what its logger was given, and what it holds.

    Comet has a run of its own, as it also takes up what is written to TensorBoard beside it.
    """
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", ".* could not ", InfluenceWarning)
        folder = tmp_path_factory.mktemp("run")
        patch.chdir(folder)
        for name, value in QUIET.items():
            patch.setenv(name, value)
        uri = f"sqlite:///{folder}/mlflow.db"
        memory, alone = Memory(), Memory()
        board, table = TensorBoardLogger("board"), CSVLogger("table")
        mlflow = MLFlowLogger(tracking_uri=uri, artifact_location=f"{folder}/artifacts")
        offline = WandbLogger(save_dir=folder, offline=True)
        try:
            ask(fit([board, table, mlflow, offline, memory]))
            run = Path(offline.experiment.dir).parent
        finally:
            wandb.finish()
        comet = CometLogger(api_key="none-is-needed", offline_directory=str(folder / "comet"))
        try:
            ask(fit([comet, alone]))
        finally:
            comet.experiment.end()
        return {
            "tensorboard": (memory.kept, read_tensorboard(board.log_dir)),
            "csv": (memory.kept, read_csv(table.log_dir)),
            "mlflow": (memory.kept, read_mlflow(uri, mlflow.run_id)),
            "wandb": (memory.kept, read_wandb(run)),
            "comet": (alone.kept, read_comet(folder / "comet")),
        }


def is_same(cell, want, digits):
    if isinstance(want, float):
        return float(cell) == pytest.approx(want, rel=digits, abs=0)
    return str(cell) == str(want)


def test_the_reference_was_given_everything(packages):
    memory, _ = packages["csv"]
    assert {name.partition("/")[0] for name in memory.metrics} == {*ANSWERS, *EDITS}
    assert {"influence/grad_norm", "influence/score_max", "forget/loss_kept_after"} < set(memory.metrics)
    tables = {f"{name}/{key}" for name in ANSWERS for key in ("top", "bottom", "diagnostics")}
    assert set(memory.tables) == tables | {f"{name}/diagnostics" for name in EDITS}
    assert set(memory.pictures) == {"shown/picture", "map/picture"}
    assert {"influence/attributions.safetensors", "relabel/edit.safetensors"} < set(memory.files)


@pytest.mark.parametrize("name", DIGITS)
def test_metrics(packages, name):
    memory, written = packages[name]
    own = {key for key in written.metrics if key.partition("/")[0] in {*ANSWERS, *EDITS}}
    assert own == set(memory.metrics)
    for key, want in memory.metrics.items():
        found = written.metrics[key]
        assert [step for step, _ in found] == [step for step, _ in want], key
        values = [value for _, value in want]
        assert [value for _, value in found] == pytest.approx(values, rel=DIGITS[name], abs=0), key


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb", "comet"])
def test_tables(packages, name):
    memory, written = packages[name]
    assert set(written.tables) == set(memory.tables)
    digits = 1e-3 if name == "tensorboard" else 1e-12
    for key, (columns, rows) in memory.tables.items():
        found = written.tables[key]
        assert found[0] == columns, key
        assert len(found[1]) == len(rows), key
        for cells, want in zip(found[1], rows, strict=True):
            assert all(map(is_same, cells, want, [digits] * len(want))), (key, cells, want)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_pictures(packages, name):
    memory, written = packages[name]
    assert set(written.pictures) == set(memory.pictures)
    for key, want in memory.pictures.items():
        found = matplotlib.image.imread(io.BytesIO(written.pictures[key]), format="png")
        np.testing.assert_allclose(found[..., :3], want[..., :3] / 255, atol=1e-6)


def test_pictures_are_drawings_in_comet(packages):
    memory, found = packages["comet"]
    assert set(found.pictures) == set(memory.pictures)
    assert all(b"<svg" in picture for picture in found.pictures.values())


@pytest.mark.parametrize("name", ["mlflow", "comet"])
def test_files(packages, name):
    memory, written = packages[name]
    assert written.files == memory.files


def test_files_of_a_run_whose_logger_has_no_folder(tmp_path, monkeypatch):
    """They lie where Lightning puts the run's checkpoints, and two runs do not share them."""
    monkeypatch.chdir(tmp_path)
    for settings in ({}, {"default_root_dir": tmp_path / "mine"}):
        logger = MLFlowLogger(tracking_uri="sqlite:///mlflow.db", artifact_location="artifacts")
        trainer = fit(logger, **settings)
        trainer.influence(query_dataloaders=make_data()[1], method="identity")
        answer = trainer.influence(query_dataloaders=make_data()[1], method="ekfac")
        folder = Path(settings.get("default_root_dir", "."), logger.experiment_id, logger.run_id, "influence")
        found = read_mlflow("sqlite:///mlflow.db", logger.run_id)
        kept = folder / "attributions.safetensors"
        torch.testing.assert_close(Attributions.load(kept).scores, answer.scores)
        assert found.files["influence/attributions.safetensors"] == kept.read_bytes()
        # The second answer takes the place of the first, also where a package would add its rows.
        assert found.tables["influence/top"][1] == answer.top(5).rows()
