"""Peers that want other versions than ours: each in a virtual environment of its own, made here when needed.

A run is a process of that environment. It is handed tensors and names in files, and hands back figures and
scores in files (``worker.py``). Environments are kept under ``.cache/venvs``; one that cannot be made is
a reason why its peer is left out, and so is a task it does not answer for.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from contender import Result, judge
from meter import StageResult
from tasks import CACHE, Task, TaskModule
from torch import Tensor

HERE = Path(__file__).resolve().parent
# By environment: what is installed, what must import afterwards, and the file that runs there.
ENVIRONMENTS = {
    "bergson": (["bergson==2.5.1"], "bergson.hessians.pipeline", "bergson_worker.py"),
    "dattri": (["dattri==0.3.0"], "dattri.algorithm", "dattri_worker.py"),
    "dattri-llm": (
        ["dattri-llm[transformers,attribution]==0.1.0"],
        "dattri_llm.attribution",
        "dattri_llm_worker.py",
    ),
}
# By contender: environment and method.
METHODS = {
    "bergson": ("bergson", "ekfac"),
    "bergson-cg": ("bergson", "cg"),
    "dattri-ekfac": ("dattri", "ekfac"),
    "dattri-cg": ("dattri", "cg"),
    "dattri-logra": ("dattri", "logra"),
    "dattri-llm": ("dattri-llm", "ekfac"),
}


# Bytes of addresses that a peer may take: more would end other people's processes as well.
MEMORY = 14 * 2**30


class LeftOutError(Exception):
    """A peer that is not measured; the message says why."""


def make_environment(name: str, folder: Path) -> Path:
    """Make an environment, if it is not there.

    Args:
        name: a key of ``ENVIRONMENTS``.
        folder: where environments are kept.

    Returns:
        Its Python.

    Raises:
        LeftOutError: if it cannot be made.
    """
    packages, module, _ = ENVIRONMENTS[name]
    home = folder / name
    python = home / "bin" / "python"
    if python.exists() and not _fails([str(python), "-c", f"import {module}"]):
        return python
    same_torch = f"torch=={torch.__version__.partition('+')[0]}"
    for words in (
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", same_torch, *packages],
        # None of them imports these, but transformers does where they are, and their builds need not fit.
        [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"],
        [str(python), "-c", f"import {module}"],
    ):
        reason = _fails(words)
        if reason:
            raise LeftOutError(f"does not install: {reason}")
    return python


def _fails(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=_surroundings())
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else ""


def _surroundings() -> dict[str, str]:
    """Return the environment's variables without those that point into ours, and with one thread."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**kept, **single, "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def write_job(task: Task, model: TaskModule, method: str, folder: Path, *, freeze: bool) -> None:
    """Write what a run needs: names, weights and data."""
    make = task.net
    said = {"module": make.__module__, "net": getattr(make, "__name__", ""), "task": task.name}
    said |= {"method": method, "pass_batch": task.pass_batch, "freeze": freeze}
    (folder / "job.json").write_text(json.dumps(said), "utf-8")
    tensors = {"weights": dict(model.net.state_dict())}
    torch.save(
        {**tensors, "train": task.train.tensors, "queries": task.queries.tensors}, folder / "tensors.pt"
    )


def measure_foreign(
    contender: str,
    task: Task,
    model: TaskModule,
    *,
    environments: Path = CACHE / "venvs",
    limit: float = 1200.0,
    small: bool = False,
    freeze: bool = True,
) -> Result:
    """Run a peer in its environment, and judge what it hands back.

    Args:
        contender: a key of ``METHODS``.
        task: what is attributed.
        model: the trained model.
        environments: where environments are kept.
        limit: seconds of wall-clock that a run may take.
        small: score against the small ground truth.
        freeze: as in ``measure``.

    Returns:
        The best of the peer's settings by quality, which flatters it, and how it does at its defaults.

    Raises:
        LeftOutError: if it does not install, does not answer, fails, or takes too long.
    """
    environment, method = METHODS[contender]
    python = make_environment(environment, environments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_job(task, model, method, folder, freeze=freeze)
        words = [str(python), str(HERE / ENVIRONMENTS[environment][2]), str(folder)]
        try:
            reason = _run(words, limit)
        except subprocess.TimeoutExpired:
            raise LeftOutError(f"took longer than {limit:g} s") from None
        if reason:
            raise LeftOutError(f"fails: {reason}")
        found = json.loads((folder / "result.json").read_text("utf-8"))
        if "error" in found:
            raise LeftOutError(found["error"])
        scores = torch.load(folder / "scores.pt", weights_only=True)
    return _judge_settings(task, found, scores, small=small)


def _run(words: list[str], limit: float) -> str:
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(
            words,
            stdout=said,
            stderr=said,
            env=_surroundings(),
            timeout=limit,
            check=False,
            cwd=words[-1],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        )
        if done.returncode == 0:
            return ""
        if done.returncode < 0:
            return f"ended by signal {-done.returncode}"
        said.seek(0)
        text = said.read()
        if "can't allocate memory" in text or "MemoryError" in text:
            return f"takes more than {MEMORY / 2**30:.0f} GiB"
        last = (text.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return textwrap.shorten(last, 160, placeholder=" ...")


def _judge_settings(task: Task, found: dict[str, Any], scores: dict[str, Tensor], *, small: bool) -> Result:
    judged = {setting: judge(task, matrix, small=small) for setting, matrix in scores.items()}
    worth = {
        setting: correlation if lds is None else lds[0]
        for setting, (lds, correlation) in judged.items()
        if lds is not None or correlation is not None
    }
    best = max(worth, key=lambda setting: worth[setting] or -1.0) if worth else found["untuned"]
    lds, correlation = judged[best]
    return Result(
        contender=found["contender"],
        task=task.name,
        settings={**found["settings"], "best": best, "untuned": found["untuned"], "tried": ", ".join(scores)},
        num_train=len(task.train),
        num_queries=len(task.queries),
        epoch_seconds=found["epoch_seconds"],
        baseline_mib=found["baseline_mib"],
        stages=[StageResult(**stage) for stage in found["stages"]],
        lds=lds,
        correlation=correlation,
        untuned=worth.get(found["untuned"]),
    )
