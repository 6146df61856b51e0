"""The damping study's short cut, one eigendecomposition, gives the scores of the public exact method."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_influence import InfluenceModule
from lightning_influence.curvature.state import InfluenceState

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The benchmark modules, with an empty cache; forgotten afterwards."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import damping
    import spectra
    import studies
    import tasks

    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    monkeypatch.setattr(studies, "CACHE", tmp_path)
    yield damping, spectra, studies
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(BENCHMARKS) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["diabetes_sgd", "diabetes_adam", "cancer_bce"])
def test_scores_from_the_spectrum_equal_the_exact_method(bench, name):
    damping, spectra, studies = bench
    full = studies.STUDIES[name]()
    task = replace(full.task, recipe=replace(full.task.recipe, epochs=2))
    study = replace(full, task=task)
    found = spectra.spectrum(task)
    model, record = spectra.recorded(task)
    module = InfluenceModule(model, state=InfluenceState(record=record))
    loaders = task.pass_loader(), task.pass_loader(task.queries)
    for asked in (0.1, "auto"):
        expected = module.scores(*loaders, method="exact", damping=asked).scores
        used = 0.1 * torch.ones(len(found.values)) if asked == 0.1 else damping.auto_damping(study, model, 0)
        # Gradients and vectors are stored in float32, in which the model runs.
        torch.testing.assert_close(
            damping.scores_at(found, used).float(),
            expected,
            rtol=1e-3,
            atol=1e-4 * expected.abs().max().item(),
        )


def test_the_tasks_differ_as_the_study_says(bench):
    studies = {name: make() for name, make in bench[2].STUDIES.items()}
    assert len(studies) >= 6
    assert {study.task.loss for study in studies.values()} == {"cross_entropy", "mse", "bce"}
    assert {study.task.recipe.optimizer for study in studies.values()} == {"sgd", "adam", "adamw"}
    assert len({study.fraction for study in studies.values()}) >= 3
    noisy, clean = studies["digits_noisy"].task, studies["digits_mlp"].task
    count = len(noisy.train)
    assert (noisy.train.tensors[1] != clean.train.tensors[1][:count]).sum() == 0.2 * count


def test_rules_of_closed_forms_are_what_the_methods_use(bench):
    """A rule's shares reach EK-FAC, and the default is back afterwards."""
    import closed_damping

    study = bench[2].STUDIES["diabetes_sgd"]()
    task = replace(study.task, recipe=replace(study.task.recipe, epochs=1))
    model, record = bench[1].recorded(task)
    module = InfluenceModule(model, state=InfluenceState(record=record))
    loaders = task.pass_loader(), task.pass_loader(task.queries)
    found = {}
    for rule in ((0.01, 0.0), (0.0, 0.01), (0.01, 0.01)):
        with closed_damping.closed_shares(rule):
            found[rule] = module.scores(*loaders, method="ekfac").diagnostics.damping
    after = module.scores(*loaders, method="ekfac").diagnostics.damping
    assert after == found[0.01, 0.01]
    for layer, value in after.items():
        assert value == pytest.approx(found[0.01, 0.0][layer] + found[0.0, 0.01][layer])
