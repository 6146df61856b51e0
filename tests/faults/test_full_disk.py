"""A disk that is full in the middle of a file: the error names it, and what was there stays."""

import errno
import os
import re
import resource
from collections import Counter

import pytest
import torch
from result_examples import diagnostics, full
from saved_files import edit

from lightning_influence import Attributions, ParameterEdit, SelfInfluence
from lightning_influence.edits.parameter_edit import Change
from lightning_influence.support.storage import load_tensors, save_tensors, write_atomically

pytestmark = pytest.mark.faults
N = 5000


@pytest.fixture
def small_disk():
    """Files cannot grow beyond 20,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def large_scores():
    return Attributions(
        scores=torch.zeros(1, N),
        train_indices=torch.arange(N),
        query_indices=torch.arange(1),
        diagnostics=diagnostics(residuals=None),
    )


def large_self_influence():
    return SelfInfluence(scores=torch.zeros(N), train_indices=torch.arange(N), diagnostics=diagnostics())


def large_edit():
    module = torch.nn.Linear(100, 100)
    weight = module.weight.detach().flatten()
    change = Change(torch.arange(N), weight[:N], weight[:N] + 1, (100, 100))
    return ParameterEdit(module, {"weight": change}, edit().report)


LARGE = {"scores": large_scores, "self-influence": large_self_influence, "edit": large_edit}


@pytest.mark.parametrize("kind", LARGE)
def test_results_and_edits_name_the_file(kind, tmp_path, small_disk, count_cases):
    path, found = tmp_path / "file", LARGE[kind]()
    for there in (False, True):
        if there:
            full().save(path)
        with pytest.raises(OSError, match=re.escape(str(path))) as caught:
            found.save(path)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
        assert os.listdir(tmp_path) == [path.name] * there  # no temporary file stays
    assert torch.equal(Attributions.load(path).scores, full().scores)
    count_cases("full disks", Counter({"told by the file's name": 2}))


def test_tensors_and_any_other_file_leave_the_old_content(tmp_path, small_disk):
    file = tmp_path / "a.safetensors"
    save_tensors(file, {"matrix": torch.eye(2)}, {})
    with pytest.raises(OSError, match=re.escape(str(file))) as caught:
        save_tensors(file, {"matrix": torch.zeros(10_000)}, {})
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    with pytest.raises(OSError, match=re.escape(str(file))), write_atomically(file) as temporary:
        temporary.write_bytes(bytes(30_000))
    assert torch.equal(load_tensors(file)[0]["matrix"], torch.eye(2))
    assert os.listdir(file.parent) == [file.name]


def test_an_edit_that_could_not_be_saved_can_still_be_applied(tmp_path, small_disk):
    found = large_edit()
    with pytest.raises(OSError, match="file"):
        found.save(tmp_path / "file")
    found.apply()
    found.revert()
