"""A process that fails in the middle of its work, or is killed: the others end with it, and nobody waits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from two_processes import check_script

BEGIN = """
import sys, warnings
import torch
from sharded_models import OFF, Narrow, load, make_trainer, make_vectors
from lightning_influence import InfluenceTrainer
from lightning_influence.errors import InfluenceError, NonFiniteError

torch.set_num_threads(1)
warnings.simplefilter("ignore")
module, data, asked = Narrow(), make_vectors(13), make_vectors(3)
if STRATEGY == "fsdp":
    trainer = make_trainer(InfluenceTrainer, sys.argv[1])
else:
    trainer = InfluenceTrainer(accelerator="cpu", devices=2, strategy="ddp", **OFF)
options = {"method": "ekfac", "damping": 0.1, "log": False}


def ask(train=data):
    return trainer.influence(module, load(train, 3), load(asked, 2), **options)
"""

RAISES = """
class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 13

    def __getitem__(self, index):
        if index == 7:
            raise ValueError("example 7 cannot be read")
        return data[index]


def fails(kind, text, question):
    try:
        question()
    except Exception as error:
        assert text in str(error), error
        return isinstance(error, kind)
    raise AssertionError(text)


ask()
ended = fails(ValueError, "example 7 cannot be read", lambda: ask(Broken()))
everyone = [None, None]
torch.distributed.all_gather_object(everyone, ended)
assert sorted(everyone) == [False, True], "one has the error itself, the other is told of it"

from lightning_influence.curvature import eigenbases

real = eigenbases.find_eigenvectors


def no_room(covariance, *args):
    if trainer.global_rank == 1:
        raise MemoryError("no room for a basis")
    return real(covariance, *args)


eigenbases.find_eigenvectors = no_room
assert fails(MemoryError, "no room for a basis", lambda: ask(make_vectors(11))) == (trainer.global_rank == 1)
eigenbases.find_eigenvectors = lambda *args: real(*args) if trainer.global_rank else 1 / 0
text = "ZeroDivisionError" if trainer.global_rank else "division by zero"
fails(Exception, text, lambda: ask(make_vectors(11)))
eigenbases.find_eigenvectors = real
assert ask().scores.isfinite().all(), "the processes are in step again"
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_end_with_the_error_of_one(tmp_path, strategy):
    check_script(f"STRATEGY = {strategy!r}\n{BEGIN}{RAISES}", tmp_path)


KILLED = """
import os, signal

steps = 0
real = Narrow.training_step


def step(self, batch, batch_idx):
    global steps
    steps += 1
    if trainer.global_rank == 1 and steps == 4:
        print("killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch, batch_idx)


Narrow.training_step = step
ask()
print("answered", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nobody_waits_for_a_process_that_was_killed(tmp_path, strategy):
    path = tmp_path / "script.py"
    path.write_text(f"STRATEGY = {strategy!r}\n{BEGIN}{KILLED}")
    helpers = Path(__file__).parents[1] / "helpers"
    paths = os.pathsep.join([str(helpers), str(helpers.parents[1])])
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(path), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert "killed" in result.stdout
    assert "answered" not in result.stdout
    assert result.returncode != 0
    assert time.monotonic() - start < 100
