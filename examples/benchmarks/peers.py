"""Benchmark of attribution methods on the tasks of ``tasks.py``: time, memory and quality.

``python examples/benchmarks/peers.py`` runs everything, each method in a process of its own; ``--tasks``,
``--contenders`` and ``--small`` make it shorter. Figures are multiples of one plain forward+backward epoch
over the same examples, on one thread.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
SMALL = (256, 32)
FLAGS = {
    "--small": "small ground truth; few examples and an untrained model where there is no truth",
    "--collect": "let a method's garbage collections walk imported objects, as in a user's process",
}

# Peers, as "file:class". A file is imported in its contender's own process only.
PEERS = {
    "kronfluence": "kronfluence_peer:Kronfluence",
    "kronfluence-default": "kronfluence_peer:KronfluenceDefault",
    "kronfluence-20": "kronfluence_peer:Kronfluence20",
}
# This package's methods: each a Contender in a file of its own.
OURS = {
    "ekfac": "influence_contender:EKFAC",
    "ekfac-tight": "influence_contender:TightEKFAC",
    "kfac": "influence_contender:KFAC",
    "ekfac-exact": "influence_contender:ExactFisher",
    "auto": "influence_contender:Auto",
}
CONTENDERS = {**OURS, **PEERS}
DEFAULT = ["ekfac", "kfac", "auto", "kronfluence"]


def run_one(contender: str, task_name: str, flags: list[str], out: Path) -> None:
    """Measure one contender on one task in this process and write the result.

    Args:
        contender: a key of ``CONTENDERS``.
        task_name: a key of ``tasks.TASKS``.
        flags: of ``FLAGS``.
        out: the JSON file to write.
    """
    from contender import measure
    from tasks import TASKS
    from truth import SIZES

    file, _, name = CONTENDERS[contender].partition(":")
    method = getattr(importlib.import_module(file), name)
    task = TASKS[task_name]()
    small = "--small" in flags
    if small and task_name not in SIZES:
        task = replace(task, train=task.train.head(SMALL[0]), queries=task.queries.head(SMALL[1]))
        model = task.untrained().eval()
    else:
        model = task.trained()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(method, task, model, Path(scratch), small=small, freeze="--collect" not in flags)
    out.write_text(json.dumps(asdict(result)), encoding="utf-8")


def spawn(contender: str, task_name: str, flags: list[str]) -> dict[str, object]:
    """Measure one contender on one task in a fresh process on one thread.

    Args:
        contender: a key of ``CONTENDERS``.
        task_name: a key of ``tasks.TASKS``.
        flags: of ``FLAGS``, passed on.

    Returns:
        The result as a dictionary, with ``error`` instead of figures if the process failed.
    """
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        words = [sys.executable, str(HERE / "peers.py"), "--one", contender, task_name, str(out)]
        done = subprocess.run(
            [*words, *flags],
            env={**os.environ, **single},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            return {"contender": contender, "task": task_name, "error": reason[0]}
        result: dict[str, object] = json.loads(out.read_text(encoding="utf-8"))
        return result


def main() -> None:
    """Run the chosen contenders on the chosen tasks, print tables, write a JSON file."""
    from report import render, save
    from tasks import TASKS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--contenders", nargs="*", choices=list(CONTENDERS), default=DEFAULT)
    for flag, meaning in FLAGS.items():
        parser.add_argument(flag, action="store_true", help=meaning)
    parser.add_argument("--json", type=Path, default=HERE / ".cache" / "results.json")
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "TASK", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    flags = [flag for flag in FLAGS if getattr(arguments, flag.removeprefix("--"))]
    if arguments.one:
        run_one(arguments.one[0], arguments.one[1], flags, Path(arguments.one[2]))
        return
    if not arguments.small:
        for name in arguments.tasks:
            TASKS[name]().trained()  # Trained here once: no contender's process pays for it.
    results = []
    for task_name in arguments.tasks:
        for contender in arguments.contenders:
            results.append(spawn(contender, task_name, flags))
            save(results, arguments.json)
        render([result for result in results if result["task"] == task_name])
    print(f"Results: {arguments.json}")


if __name__ == "__main__":
    main()
