"""Saved states that are not what was saved: named, and never in the way of a fit."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from callback_models import Classifier, fit, loader, same, tensors

from lightning_influence.api.module import InfluenceModule
from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.collecting.state import read_saved_state
from lightning_influence.support.errors import CorruptFileError, InfluenceError, InfluenceWarning


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in the middle of a run, after a question."""
    folder = tmp_path_factory.mktemp("saved")
    module, callback = Classifier("adam"), InfluenceCallback(every_n_steps=1)
    host = fit(module, callback, max_epochs=3)
    host.influence(module, loader(), loader(8), method="auto", log=False)
    host.save_checkpoint(folder / "a.ckpt")
    return torch.load(folder / "a.ckpt", weights_only=True)


def change(state, path, value):
    """A copy of a state with another value at a place; without checksums, as an older version wrote it."""
    changed = copy.deepcopy(state)
    del changed["checksums"]
    *parents, last = path
    part = changed
    for key in parents:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return changed


def resume(saved, state, tmp_path, strict=False):
    """Continue the fit from a checkpoint with another state of the callback; what was said of it."""
    checkpoint = {**saved, "callbacks": {"InfluenceCallback": state}}
    torch.save(checkpoint, tmp_path / "b.ckpt")
    callback, module = InfluenceCallback(every_n_steps=1, strict=strict), Classifier("adam")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        host = fit(module, callback, max_epochs=4, ckpt_path=tmp_path / "b.ckpt")
    assert host.global_step == 20
    return callback, module, [str(w.message) for w in record if issubclass(w.category, InfluenceWarning)]


PLACES = [
    (("collector", "generations"), 3, "'collector/generations' is 3; accepted is a mapping"),
    (("collector", "generations", "current"), None, "no 'collector/generations/current'"),
    (("collector", "schedule", "end"), "x", "'collector/schedule/end' is 'x'; accepted is an integer"),
    (("collector", "schedule", "phase"), "?", r"'collector/schedule/phase' is '\?'; accepted is one of"),
    (("collector", "schedule", "costs"), {"basis": 1.0}, "no 'collector/schedule/costs/covariances'"),
    (("collector", "record", "layers"), 3, "'collector/record/layers' is 3"),
    (("collector", "record", "layers", "net.0", "rate"), "1", "'collector/record/layers/net.0/rate' is '1'"),
    (("collector", "record", "more"), 1, "unknown entry 'collector/record/more'"),
    (("collector", "noise"), [1.0], r"'collector/noise' is \[1.0\]; accepted is three numbers"),
    (("collector", "collected"), -1, "'collector/collected' is -1"),
    (("fingerprint",), [1], r"'fingerprint' is \[1\]; accepted is a mapping"),
    (("fingerprint", "net.0.weight"), [1], "'fingerprint/net.0.weight'"),
    (("extra_state",), None, "no 'extra_state'"),
    (("extra_state", "queries"), {"mean_loss": 1.0, "factors": 3}, "cannot be read"),
    (
        ("collector", "generations", "current", "net.0/inputs"),
        torch.ones(1, 2, 3),
        r"net.0/inputs' is a tensor of shape \(1, 2, 3\) and torch.float32; accepted is a floating-point",
    ),
    (("collector", "generations", "current", "net.0/outputs"), "a", "net.0/outputs' is 'a'"),
    (("collector", "generations", "current", "net.0/squares"), torch.ones(2), "net.0/squares' is a tensor"),
    (("collector", "generations", "current", "net.3/counts"), [1, 2], "net.3/counts' is"),
    (("collector", "generations", "current", "layers"), ["net.9"], "no 'collector/.*/net.9/counts'"),
]


@pytest.mark.parametrize(("path", "value", "message"), PLACES, ids=["/".join(path) for path, _, _ in PLACES])
def test_a_malformed_part_is_named_and_the_fit_goes_on_without_it(saved, tmp_path, path, value, message):
    state = change(saved["callbacks"]["InfluenceCallback"], path, value)
    callback, module, told = resume(saved, state, tmp_path)
    assert len(told) == 1, told
    assert told[0].startswith("What the checkpoint holds of an earlier fit is not used: ")
    with pytest.raises(CorruptFileError, match=message):
        InfluenceCallback(strict=True).load_state_dict(state)
    with pytest.raises(CorruptFileError, match=message):
        read_saved_state({"callbacks": {"InfluenceCallback": state}})
    assert callback.num_collected == 5
    # The training itself is the one that goes on from the unchanged checkpoint.
    _, expected, _ = resume(saved, saved["callbacks"]["InfluenceCallback"], tmp_path)
    assert same(dict(module.state_dict()), dict(expected.state_dict()))


def test_a_sound_state_is_continued_with_and_without_checksums(saved, tmp_path):
    state = saved["callbacks"]["InfluenceCallback"]
    older = {name: part for name, part in state.items() if name != "checksums"}
    ends = [resume(saved, given, tmp_path) for given in (state, older)]
    assert [told for _, _, told in ends] == [[], []]
    assert [callback.num_collected for callback, _, _ in ends] == [20, 20]
    assert same(ends[0][0].state_dict(), ends[1][0].state_dict())


def test_a_state_without_the_costs_of_hooks_counts_none(saved, tmp_path):
    older = copy.deepcopy(saved["callbacks"]["InfluenceCallback"])
    del older["checksums"], older["collector"]["schedule"]["costs"]["hooks"]
    callback, _, told = resume(saved, older, tmp_path)
    assert (callback.num_collected, told) == (20, [])
    assert callback.state_dict()["collector"]["schedule"]["costs"]["hooks"] == 0


def test_every_flipped_bit_of_a_tensor_is_noticed_by_name(saved, tmp_path):
    state = saved["callbacks"]["InfluenceCallback"]
    draw = random.Random(0)
    places = tensors(state)
    assert any("queries/coarse" in place for place in places)
    for place in places:
        flipped = copy.deepcopy(state)
        tensor = tensors(flipped)[place]
        content = tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        tensor.copy_(content.view(tensor.dtype).view(tensor.shape))
        with pytest.raises(CorruptFileError, match="was altered after it was saved") as caught:
            read_saved_state({"callbacks": {"InfluenceCallback": flipped}})
        # Parts that were equal when they were saved may be one tensor.
        at = tensor.data_ptr()
        named = [name.lstrip("/") for name, other in tensors(flipped).items() if other.data_ptr() == at]
        assert any(repr(name) in str(caught.value) for name in named)
    torch.save({**saved, "callbacks": {"InfluenceCallback": flipped}}, tmp_path / "b.ckpt")
    with pytest.raises(InfluenceError, match="was altered after it was saved"):
        InfluenceModule.from_checkpoint(tmp_path / "b.ckpt", Classifier("adam"))


@pytest.mark.parametrize("state", [{}, {"collector": 1}, {"a": 1}, 3, [1]])
def test_what_is_no_state_at_all(state):
    callback = InfluenceCallback()
    with pytest.warns(
        InfluenceWarning, match="an earlier fit is not used: (In t|T)he callback's saved state"
    ):
        callback.load_state_dict(state)
    fit(Classifier(), callback, max_epochs=1)
    assert callback.num_collected > 0
