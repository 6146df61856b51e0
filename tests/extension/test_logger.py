"""A logger of the user's own, registered from outside the package with its own way of showing results."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceTrainer, InfluenceWarning, Labels
from lightning_influence.results.loggers import log_media


class Notebook(Logger):
    """Keeps what it is given, as a logger of a company's own service would send it off."""

    name, version = "notebook", 0

    def __init__(self, fails=False):
        self.numbers, self.pages, self.fails = {}, {}, fails

    def log_hyperparams(self, params, *args, **kwargs):
        """There is nothing to note."""

    def log_metrics(self, metrics, step=None):
        self.numbers |= metrics


@log_media.register(Notebook)
def write_page(logger, media):
    if logger.fails:
        raise ConnectionError("no route to host")
    for end, ranking in media.rankings.items():
        logger.pages[f"{media.name}/{end}"] = [ranking.columns(), *ranking.rows()]
    logger.pages[f"{media.name}/facts"] = dict(media.facts)


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


DATA = TensorDataset(torch.randn(12, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Files of a run whose logger has no folder of its own lie in the working directory."""
    monkeypatch.chdir(tmp_path)


def make_trainer(logger):
    return InfluenceTrainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_registered_logger_shows_scores_and_edits_its_own_way():
    notebook, module = Notebook(), Line()
    trainer = make_trainer(notebook)
    trainer.fit(module, DataLoader(DATA, 4))
    asked = DataLoader(torch.utils.data.Subset(DATA, range(3)), 3)
    found = trainer.influence(
        module, DataLoader(DATA, 4), asked, method="ekfac", labels=Labels(train=["even", "odd"] * 6)
    )
    heading, *rows = notebook.pages["influence/top"]
    assert heading == ["query", "rank", "train", "train_label", "score"]
    best = found.top(5)
    assert [row[2] for row in rows] == best.indices.flatten().tolist()
    assert [row[4] for row in rows] == pytest.approx(best.scores.flatten().tolist())
    assert all(label == ("odd" if index % 2 else "even") for _, _, index, label, _ in rows)
    assert notebook.pages["influence/facts"]["method"] == "ekfac"
    assert notebook.numbers["influence/queries"] == 3
    trainer.forget([0], module, DataLoader(DATA, 4))
    assert "change" in notebook.pages["forget/facts"]


def test_a_registered_logger_that_fails_becomes_a_warning():
    notebook, module = Notebook(fails=True), Line()
    with pytest.warns(InfluenceWarning, match=r"Notebook could not log .* tables and figures: ConnectionErr"):
        make_trainer(notebook).influence(module, DataLoader(DATA, 4), DataLoader(DATA, 4), method="ekfac")
    assert notebook.numbers["influence/queries"] == 12
    assert not notebook.pages
