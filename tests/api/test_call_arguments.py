"""Arguments of a wrong type are refused by name before anything runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from influence_cases import quiet
from influence_models import Net, fitted, queries, train, trainer
from lightning.pytorch.loggers import CSVLogger
from result_examples import full, self_influence

from lightning_influence import (
    Attributions,
    InfluenceModule,
    average_attributions,
    forget,
    influence,
    relabel,
)
from lightning_influence import self_influence as ask_self_influence
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.results.loggers import log_attributions
from lightning_influence.results.plots import montage
from lightning_influence.running.runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore:.*logging interval")
QUICK = {"method": "kfac", "damping": 0.1}


@pytest.fixture
def no_pass(monkeypatch):
    """No pass may run."""

    def run(self, *_):
        raise AssertionError("a pass ran")

    monkeypatch.setattr(Runner, "run", run)


CALLS = [
    (
        {"ckpt_path": 3},
        TypeError,
        "Got ckpt_path=3; accepted are 'best', 'last', a path, a list of them, or None",
    ),
    ({"ckpt_path": b"a"}, TypeError, "Got ckpt_path=b'a'; accepted are 'best'"),
    ({"ckpt_path": ["a", 3]}, TypeError, "Got ckpt_path=['a', 3]; accepted are 'best'"),
    ({"datamodule": "x"}, TypeError, "Got datamodule of type str; accepted is a LightningDataModule"),
    ({"datamodule": train()}, TypeError, "Loaders go to train_dataloaders and query_dataloaders"),
    ({"factors": "refitt"}, TypeError, "Got factors='refitt'; accepted are Factors, 'refit' or None"),
    ({"name": None}, TypeError, "Got name=None; accepted is a text: the prefix of what is logged"),
    ({"name": 3}, TypeError, "Got name=3; accepted is a text"),
    ({"name": ""}, ValueError, "Got an empty name; accepted is a text"),
]


@pytest.mark.parametrize(("options", "error", "message"), CALLS)
@pytest.mark.usefixtures("no_pass")
def test_a_trainers_arguments(options, error, message, tmp_path):
    host, module = trainer(logger=CSVLogger(tmp_path)), Net()
    with quiet(), pytest.raises(error, match=re.escape(message)):
        host.influence(module, train(), queries(), **options)
    if options.get("ckpt_path") != ["a", 3]:
        with quiet(), pytest.raises(error, match=re.escape(message)):
            host.self_influence(module, train(), **options)


@pytest.mark.usefixtures("no_pass")
def test_a_model_in_the_trainers_place():
    module = Net()
    swapped = r"Got a LightningModule as trainer; .* influence\(trainer, model, \.\.\.\)"
    for options in ({}, {"ckpt_path": ["a"]}):
        with pytest.raises(TypeError, match=swapped):
            influence(module, trainer(), train(), queries(), **options)
    with pytest.raises(TypeError, match=swapped):
        ask_self_influence(module, trainer(), train())
    with pytest.raises(TypeError, match="Got DataLoader as trainer"):
        influence(train(), module)
    with pytest.raises(TypeError, match=r"Expected a LightningModule of .* got InfluenceTrainer"):
        trainer().influence(trainer(), train(), queries())


def test_a_modules_factors_and_state():
    with pytest.raises(
        TypeError, match=r"Got factors of type str; accepted are Factors, or None.*fit_factors"
    ):
        InfluenceModule(Net(), factors="refit")
    with pytest.raises(TypeError, match="Got state of type dict; accepted are InfluenceState, or None"):
        InfluenceModule(Net(), state={})
    with pytest.raises(TypeError, match=r"Expected a LightningModule of .* got Linear"):
        InfluenceModule(torch.nn.Linear(2, 2))


def test_fit_factors_has_no_method_and_keeps_what_there_is_until_it_has_more():
    module = InfluenceModule(Net())
    factors = module.fit_factors(train())
    with pytest.raises(TypeError, match=r"Got method='kfac'; fit_factors has no method: its factors serve"):
        module.fit_factors(train(), method="kfac")
    with pytest.raises(TypeError, match="Got an unknown option 'fishr'"):
        module.fit_factors(train(), fishr="exact")
    assert module.state.factors is factors
    assert module.fit_factors(train()) is not factors


def test_a_wrapped_module_is_wrapped_once():
    inner = InfluenceModule(Net())
    inner.fit_factors(train())
    outer = InfluenceModule(inner)
    assert outer.model is inner.model
    assert outer.state is inner.state
    asked = {"train_dataloaders": train(), "query_dataloaders": queries(), **QUICK}
    torch.testing.assert_close(outer.scores(**asked).scores, inner.scores(**asked).scores)
    own, factors = InfluenceState(), inner.state.factors
    assert InfluenceModule(inner, state=own).state is own
    again = InfluenceModule(inner, factors=factors)
    assert again.state is not inner.state
    assert again.state.factors is factors


def test_averages_take_any_iterable_of_attributions():
    parts = [full(), full()]
    expected = average_attributions(parts)
    assert torch.equal(average_attributions(part for part in parts).scores, expected.scores)
    assert torch.equal(average_attributions(dict(enumerate(parts)).values()).scores, expected.scores)
    accepted = r"pass several answers to the same question: average_attributions\(\[first, second\]\)"
    for wrong, what in (
        (full(), "one Attributions"),
        (3, "one int"),
        ([full(), self_influence()], "a SelfInfluence at position 1"),
        (["a.safetensors"], "a str at position 0"),
    ):
        with pytest.raises(TypeError, match=f"Got {what}; {accepted}"):
            average_attributions(wrong)


@pytest.mark.parametrize("shown", [0, -1])
def test_fewer_queries_than_one_are_not_shown(shown):
    for show in (full().top, full().bottom):
        with pytest.raises(ValueError, match=f"Got max_queries={shown}; accepted are integers of at least 1"):
            show(2, max_queries=shown)
    images = torch.rand(100, 4, 4)
    with pytest.raises(ValueError, match=f"Got max_queries={shown}; accepted are integers of at least 1"):
        montage(full(), images, images, k=1, max_queries=shown)
    assert "and 2 more queries" in repr(full().top(2, max_queries=1))


def test_home_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    full().save("~/a.safetensors")
    assert torch.equal(Attributions.load(Path("~/a.safetensors")).scores, full().scores)
    files = log_attributions([], full(), step=0, directory="~/logged")
    assert all(file.is_file() and file.parent == tmp_path / "logged" for file in files)
    assert len(files) == 2
    assert not list((tmp_path / "work").iterdir())
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        Attributions.load("~/none")


def test_a_fitted_trainer_logs_under_a_name(tmp_path):
    host, _ = fitted(logger=CSVLogger(tmp_path))
    with quiet():
        host.influence(query_dataloaders=queries(), name="mine", **QUICK)
    assert (Path(host.log_dir) / "mine" / "attributions.safetensors").is_file()


def test_arguments_of_edits_through_a_trainer():
    own, model = trainer(), Net()
    with pytest.raises(TypeError, match="Got ckpt_path=3"):
        forget(own, [0], model, ckpt_path=3)
    with pytest.raises(TypeError, match="an edit is of one checkpoint"):
        relabel(own, [0], 1, model, ckpt_path=["a", "b"])
    with pytest.raises(TypeError, match="Got a LightningModule as trainer"):
        forget(model, [0], own)
    with pytest.raises(TypeError, match="Got name=None"):
        forget(own, [0], model, name=None)
