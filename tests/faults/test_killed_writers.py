"""Processes that are killed while they write, and worker processes whose parent is killed."""

import fcntl
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import harness_models as models
import pytest
from result_examples import full
from saved_files import EDITED, edit

from lightning_influence import Attributions, ParameterEdit
from lightning_influence.support.storage import save_tensors, write_atomically

pytestmark = pytest.mark.faults
FORK = multiprocessing.get_context("fork")


def write_scores(path, number):
    full(query_indices=full().query_indices + number).save(path)


def write_edit(path, number):
    edit(float(number)).save(path)


def shift(found):
    change = found.changes["weight"]
    return (change.after - change.before)[0]


WRITERS = {
    "scores": (write_scores, lambda path: int(Attributions.load(path).query_indices[0]) - 5),
    "edit": (write_edit, lambda path: round(float(shift(ParameterEdit.load(path, EDITED))))),
}


def write_for_ever(write, path, began):
    number = 1
    while True:
        write(path, number)
        began.set()
        number = 3 - number


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_the_old_or_the_new_one_whenever_its_writer_is_killed(kind, tmp_path, count_cases):
    (write, read), path, draw, outcomes = WRITERS[kind], tmp_path / "file", random.Random(kind), Counter()
    write(path, 0)
    for _ in range(15):
        began = FORK.Event()
        writer = FORK.Process(target=write_for_ever, args=(write, path, began))
        writer.start()
        try:
            assert began.wait(60)
            time.sleep(0.005 * draw.random())
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        outcomes["old" if read(path) == 1 else "new"] += 1
        outcomes["left a temporary file"] += len(list(tmp_path.iterdir())) - 1
        write(path, 0)  # the next one removes what was left
        assert list(tmp_path.iterdir()) == [path]
    left = outcomes.pop("left a temporary file")
    count_cases(f"killed writers ({kind})", outcomes)
    assert left > 0  # some were in the middle


def write_half(path):
    with write_atomically(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    file = tmp_path / "a.safetensors"
    others = file.with_name("b.safetensors"), file.with_name(f".{file.name}.backup.tmp")
    save_tensors(file, {}, {})
    others[1].touch()
    for path in (file, file, others[0]):
        writer = FORK.Process(target=write_half, args=(path,))
        writer.start()
        writer.join()
    left = {path.name for path in file.parent.iterdir()}
    assert len(left) == 4  # a killed writer is a next one, too
    save_tensors(file, {}, {})
    assert len({path.name for path in file.parent.iterdir()}) == 3
    save_tensors(others[0], {}, {})
    assert {path.name for path in file.parent.iterdir()} == {file.name, *(path.name for path in others)}


def test_a_writer_leaves_another_that_is_at_work_alone(tmp_path):
    file = tmp_path / "file"
    with write_atomically(file) as slow:
        slow.write_text("slow")
        with write_atomically(file) as quick:
            quick.write_text("quick")
        assert file.read_text() == "quick"
    assert file.read_text() == "slow"
    assert os.listdir(file.parent) == [file.name]


def test_what_a_version_before_left_is_removed(tmp_path):
    file = tmp_path / "file"
    file.with_name(f".{file.name}.{'0' * 32}.tmp").write_text("half")
    save_tensors(file, {}, {})
    assert os.listdir(file.parent) == [file.name]


ORPHANING = """
import harness_models as models, torch
from lightning_influence.evaluation import Retraining, retrain_subsets

if __name__ == "__main__":
    endless = Retraining(models.endless, models.trainer, models.held_data, models.loader, models.queries)
    masks = torch.ones(1, 8, dtype=torch.bool)
    retrain_subsets(endless, masks, [0, 1, 2], processes=2, progress=False, cache_dir="runs", cache_key="-")
"""


def lives(lock):
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(condition):
    """Wait for at most two minutes, which a busy machine may need to start processes."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """One is in the middle of a run, which never ends, the other waits for work."""
    (tmp_path / "script.py").write_text(ORPHANING)
    paths = os.pathsep.join([str(Path(models.__file__).parent), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "HARNESS_TEST_FOLDER": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=environment)
    try:
        wait_until(lambda: len([*tmp_path.glob("runs/*/*.safetensors")]) == 2)
        locks = [*tmp_path.glob("*.lock")]
        assert len(locks) == 3  # the parent and two workers
        assert all(map(lives, locks))
    finally:
        parent.kill()
        parent.wait()
    killed = time.monotonic()
    wait_until(lambda: not any(map(lives, locks)))
    assert time.monotonic() - killed < 10
