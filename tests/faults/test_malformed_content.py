"""Content that makes no sense behind sound checksums: one kind of error, or something that can be used."""

import copy
import random
import warnings
from collections import Counter

import pytest
import torch
from callback_models import Classifier, fit
from mutations import mutate
from saved_files import SAVED, write_checkpoint

from lightning_influence import InfluenceCallback
from lightning_influence.collecting.state import read_saved_state
from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.results.loggers import summary_metrics
from lightning_influence.support.errors import CorruptFileError, EditMismatchError, InfluenceError
from lightning_influence.support.storage import load_tensors, save_tensors

pytestmark = pytest.mark.faults
ODD = [None, -1, 3.5, float("nan"), 2**70, "x", [], [1], {}, {"a": 1}, True, torch.ones(2), torch.ones(0)]


def use(found):
    """What loads can be shown, ranked and logged."""
    assert str(found)
    assert repr(found)
    assert found.report.metrics() if isinstance(found, ParameterEdit) else summary_metrics(found)


@pytest.mark.parametrize("kind", ["scores", "ends of rankings", "self-influence", "edit"])
def test_files_are_refused_by_name_or_can_be_used(kind, tmp_path, pytestconfig, count_cases):
    saved, path, draw = SAVED[kind], tmp_path / "malformed", random.Random(kind)
    saved.write(path)
    tensors, metadata = load_tensors(path)
    outcomes, cases, messages = Counter(), 3 * pytestconfig.getoption("--damaged-files"), []
    for _ in range(cases):
        save_tensors(path, tensors, mutate(metadata, draw))
        try:
            found = saved.read(path)
        except CorruptFileError as error:
            outcomes["refused"] += 1
            messages.append(str(error))
        except EditMismatchError:
            outcomes["refused"] += 1  # an edit of another parameter
        else:
            use(found)
            outcomes["usable"] += 1
    count_cases(f"malformed content ({kind})", outcomes)
    assert all(str(path) in message for message in messages)
    assert outcomes["refused"] > cases / 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    write_checkpoint(path)
    return torch.load(path, weights_only=True)


def leaves(part, path=()):
    """Places of everything in a nested state."""
    if path:
        yield path
    if isinstance(part, dict):
        for key, value in part.items():
            yield from leaves(value, (*path, key))


def alter(state, draw, checksums):
    """A copy with another value somewhere; without checksums, as an older version wrote it."""
    mutated = copy.deepcopy(state)
    if not checksums:
        del mutated["checksums"]
    path, value = draw.choice([*leaves(mutated)]), draw.choice(ODD)
    part = mutated
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return mutated


@pytest.mark.parametrize("checksums", [True, False])
def test_states_of_the_callback_are_refused_or_as_good_as_before(saved, checksums, pytestconfig, count_cases):
    state, draw, outcomes = saved["callbacks"]["InfluenceCallback"], random.Random(1), Counter()
    cases = 3 * pytestconfig.getoption("--damaged-files")
    for _ in range(cases):
        try:
            read_saved_state({"callbacks": {"InfluenceCallback": alter(state, draw, checksums)}})
        except InfluenceError:
            outcomes["refused"] += 1
        else:
            outcomes["usable"] += 1
    count_cases("malformed content (state of the callback)", outcomes)
    assert outcomes["refused"] > 0.6 * cases


def test_a_fit_goes_on_without_a_state_that_is_malformed(saved, tmp_path, pytestconfig, count_cases):
    state, draw, outcomes = saved["callbacks"]["InfluenceCallback"], random.Random(2), Counter()
    expected = None
    for _ in range(1 + pytestconfig.getoption("--damaged-files") // 10):
        given = state if expected is None else alter(state, draw, draw.random() < 0.5)
        torch.save({**saved, "callbacks": {"InfluenceCallback": given}}, tmp_path / "b.ckpt")
        module = Classifier("adam")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            host = fit(
                module, InfluenceCallback(every_n_steps=1), max_epochs=4, ckpt_path=tmp_path / "b.ckpt"
            )
        assert host.global_step == 20
        expected = expected or copy.deepcopy(module.state_dict())
        assert all(torch.equal(weight, expected[name]) for name, weight in module.state_dict().items())
        told = any("is not used" in str(w.message) for w in told)
        outcomes["without the state" if told else "with the state"] += 1
    count_cases("resumed fits", outcomes)
