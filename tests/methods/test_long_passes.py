"""Where passes are long and outputs many, ``auto`` is EK-FAC, and says so."""

import pytest
import torch
from influence_cases import quiet
from models import CASES, lightning_module, loader

from lightning_influence import InfluenceModule
from lightning_influence.api import engine

CASE = CASES["tokens"]
ALONE = "The answer is that of method='ekfac'"


@pytest.fixture(autouse=True)
def long_passes_and_many_columns(monkeypatch):
    monkeypatch.setattr("lightning_influence.methods.forecast._LONG", 0.0)
    monkeypatch.setattr("lightning_influence.methods.long_passes.MOST_COLUMNS", 2)


def ask(module, name="scores", **options):
    train = loader(CASE, 5)
    given = (train,) if name == "self_influence" else (train, loader(CASE, 2, queries=True))
    with quiet():
        return getattr(module, name)(*given, **options)


@pytest.mark.grid
@pytest.mark.parametrize("damping", ["auto", 0.05])
@pytest.mark.parametrize("tolerance", [None, 0.0])
def test_answers_are_those_of_ekfac(damping, tolerance):
    options = {"damping": damping, "low_rank_tolerance": tolerance}
    module = InfluenceModule(lightning_module(CASE))
    found, expected = ask(module, method="auto", **options), ask(module, method="ekfac", **options)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-12, atol=1e-14)
    assert found.diagnostics.method == "ekfac"
    assert found.diagnostics.residuals is None
    assert found.diagnostics.damping == expected.diagnostics.damping
    assert [note for note in found.diagnostics.warnings if note.startswith(ALONE)]
    assert not any("leverages" in one["name"] for one in found.diagnostics.passes)
    itself = [ask(module, "self_influence", method=method, **options) for method in ("auto", "ekfac")]
    torch.testing.assert_close(itself[0].scores, itself[1].scores, rtol=1e-12, atol=1e-14)
    whole = [ask(module, "ihvp", method=method, **options)[0] for method in ("auto", "ekfac")]
    torch.testing.assert_close(*whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("given", [{"curvature_examples": 4096}, {"max_steps": 1}, {"tolerance": 0.1}])
def test_a_correction_that_is_asked_for_is_made_and_used_again(given):
    module = InfluenceModule(lightning_module(CASE))
    found = ask(module, method="auto", damping=0.05, **given)
    assert found.diagnostics.method == "auto"
    assert found.diagnostics.extra["coarse_space"]
    again = ask(module, method="auto", damping=0.05)  # what is there costs nothing
    assert again.diagnostics.method == "auto"
    assert not any(note.startswith(ALONE) for note in again.diagnostics.warnings)


def test_short_passes_and_few_columns_are_corrected(monkeypatch):
    for where, value in (("long_passes.MOST_COLUMNS", 1000), ("forecast._LONG", 1e30)):
        with monkeypatch.context() as patch:
            patch.setattr(f"lightning_influence.methods.{where}", value)
            found = ask(InfluenceModule(lightning_module(CASE)), method="auto", damping=0.05)
        assert found.diagnostics.method == "auto"


def test_prepared_without_a_question():
    module = InfluenceModule(lightning_module(CASE))
    with quiet():
        module.prepare(loader(CASE, 5), method="auto", damping=0.05)
    assert module.state.factors is not None
    assert module.state.coarse is None
    assert module.state.compact is None


def test_it_is_foretold(monkeypatch):
    monkeypatch.setattr(engine, "_LONG", 1)
    module = InfluenceModule(lightning_module(CASE), progress=True)
    found = ask(module, method="auto", damping=0.05)
    names = [one["name"] for one in found.diagnostics.passes]
    assert names.count("Influence: trial") == 2
    assert found.diagnostics.extra["forecast"]["passes"] == len(names) - 1
