"""What a call is going to take: said before its first pass, where somebody looks on and passes are long."""

import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from two_processes import check_script

import lightning_influence
from lightning_influence import InfluenceModule
from lightning_influence.api import engine
from lightning_influence.methods.forecast import Forecast, TrialPass, format_seconds
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.running.runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore")
LOGGER = "lightning.pytorch.influence"


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Flatten(), nn.Linear(9, 2))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0][:, None]), batch[1])


def load(count: int, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size)


@pytest.fixture
def labels(monkeypatch):
    """Labels of the passes of a call, in order."""
    seen, label = [], Runner.label
    monkeypatch.setattr(Runner, "label", lambda self, one: seen.append(label(self, one)) or seen[-1])
    return seen


@pytest.mark.parametrize("method", ["identity", "diagonal", "kfac", "ekfac", "auto"])
def test_passes_are_foretold_and_counted(method, labels, caplog, monkeypatch):
    monkeypatch.setattr(engine, "_LONG", 10)
    with caplog.at_level(logging.INFO, logger=LOGGER):
        found = InfluenceModule(Net(), progress=True).scores(load(40), load(6), method=method)
    told, passes = found.diagnostics.extra["forecast"], len(found.diagnostics.passes)
    assert caplog.messages[0].startswith(f"Influence: about {told['passes']} passes, roughly ")
    assert "the 40 training examples" in caplog.messages[0]
    assert labels[0] == "Influence: trial"
    known = min(told["passes"], passes - 1)
    assert [label.rpartition(" ")[2] for label in labels[1 : known + 1]] == [
        f"({number}/{told['passes'] + 1})" for number in range(2, known + 2)
    ]
    assert abs(told["passes"] - (passes - 1)) <= (2 if method == "auto" else 0)
    assert 0 < told["seconds"] < 600


def test_what_is_known_is_not_foretold_again(monkeypatch):
    monkeypatch.setattr(engine, "_LONG", 10)
    module = InfluenceModule(Net(), progress=True)
    first, second = (module.scores(load(40), load(6), method="ekfac") for _ in range(2))
    told = [answer.diagnostics.extra["forecast"] for answer in (first, second)]
    assert [one["passes"] for one in told] == [3, 2]
    assert told[1]["seconds"] < told[0]["seconds"]
    assert torch.equal(first.scores, second.scores)


def test_groups_of_queries_are_foretold(monkeypatch):
    """Memory for two queries at a time, and for no gradients between the two passes of the factors."""
    monkeypatch.setattr(engine, "_LONG", 10)
    net = Net()
    budget = 2 * 2 * 4 * sum(p.numel() for p in net.parameters())
    options = {"method": "ekfac", "memory_budget": budget, "low_rank_tolerance": 0.0}
    found = InfluenceModule(net, progress=True).scores(load(40), load(6), **options)
    names = [one["name"].removeprefix("Influence: ") for one in found.diagnostics.passes]
    assert names == ["trial", "covariances", "eigenvalues", *["query gradients", "scores"] * 3]
    assert found.diagnostics.extra["forecast"]["passes"] == len(names) - 1


@pytest.mark.parametrize("progress", [True, False])
def test_short_calls_and_those_that_nobody_watches_have_no_trial(progress, monkeypatch):
    monkeypatch.setattr(engine, "_LONG", 11 if progress else 10)
    found = InfluenceModule(Net(), progress=progress).scores(load(40), load(6), method="ekfac")
    assert "forecast" not in found.diagnostics.extra
    assert found.diagnostics.passes[0]["name"] != "Influence: trial"


def test_the_bar_of_a_trainer_tells_it_too(labels, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_LONG", 10)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path, accelerator="cpu"
    )
    loaders = {"train_dataloaders": load(40), "query_dataloaders": load(6)}
    found = lightning_influence.influence(trainer, Net(), method="ekfac", **loaders)
    assert found.diagnostics.extra["forecast"]["passes"] == 3
    assert [label.rpartition(" ")[2] for label in labels] == ["trial", "(2/4)", "(3/4)", "(4/4)"]


def test_operations_are_counted_by_hand():
    plan = find_layers(Net())
    trial = TrialPass(plan)
    trial.seconds, trial.positions = 2.0, {"net.0": 3, "net.2": 1}
    told = Forecast(trial, plan.layers, examples=10, speed=1.0)
    told.add_factors(0)
    assert told.passes == []
    assert told.seconds == 0
    told.add_factors(2)
    # With biases, the convolution is a matrix of 3 rows and 3 columns at 3 positions, the other one 2 by 10.
    squares = (3 * (9 + 9), 4 + 100)
    rotated = (3 * (9 + 9 + 9), 4 + 100 + 20)
    whole = 20 * (27 + 27 + 8 + 1000)
    assert told.decomposing == whole
    assert told.seconds == whole + 10 * (2.0 + 2 * sum(squares)) + 10 * (2.0 + 2 * sum(rotated))
    before = told.seconds
    told.add_scores(queries=4, groups=2)
    assert told.passes[2:] == ["query gradients", "scores"] * 2
    scores = 2 * (9 * (3 + 2) + 20 * (1 + 2))  # low rank is not less here
    assert told.seconds == before + 4 * 2.0 + 2 * 10 * (2.0 + scores)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (9000, "2 h 30 min")],
)
def test_durations_are_told_in_one_or_two_units(seconds, words):
    assert format_seconds(seconds) == words


SCRIPT = """
import math, sys, warnings
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence import influence
from lightning_influence.api import engine

torch.set_num_threads(1)
warnings.simplefilter("ignore")
engine._LONG, engine._TRIED = 4, 1  # the trial is of one example, so that the second process has nothing


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


torch.manual_seed(0)
x = torch.randn(16, 4)
loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 1)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_model_summary=False, default_root_dir=sys.argv[1],
)
found = influence(trainer, Net(), loader, loader, method="ekfac", log=False)
told = found.diagnostics.extra["forecast"]
assert told["passes"] >= 3 and 0 < told["seconds"] < math.inf
"""


@pytest.mark.slow
def test_a_process_without_a_batch_of_the_trial_is_told_by_the_others(tmp_path):
    check_script(SCRIPT, tmp_path)
