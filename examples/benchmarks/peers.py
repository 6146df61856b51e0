"""Attribution methods on the tasks of ``tasks.py`` and ``large_tasks.py``: time, memory and quality.

``python examples/benchmarks/peers.py`` runs everything that two slow cores can, each method in a process of
its own; ``--tasks``, ``--contenders`` and ``--small`` make it shorter, ``--tasks resnet18 language`` ask for
more. Peers that want versions of their own get an environment (``foreign.py``). Figures are multiples of one
plain forward+backward epoch over the same examples, on one thread.
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
    "ekfac-layers": "influence_contender:LayersEKFAC",
    "ekfac-tight": "influence_contender:TightEKFAC",
    "kfac": "influence_contender:KFAC",
    "ekfac-exact": "influence_contender:ExactFisher",
    "auto": "influence_contender:Auto",
}
# Peers in environments of their own: the keys of ``foreign.METHODS``.
FOREIGN = ("bergson", "bergson-cg", "dattri-ekfac", "dattri-cg", "dattri-logra", "dattri-llm")
CONTENDERS = (*OURS, *PEERS, *FOREIGN)
DEFAULT = ["ekfac", "ekfac-layers", "kfac", "auto", "kronfluence", *FOREIGN]
DEFAULT_TASKS = ["digits_mlp", "digits_cnn", "large_mlp", "transformer", "resnet10", "language_small"]


def run_one(contender: str, task_name: str, flags: list[str], out: Path, environments: Path | None) -> None:
    """Measure one contender on one task in this process and write the result.

    Args:
        contender: one of ``CONTENDERS``.
        task_name: a key of ``large_tasks.ALL_TASKS``.
        flags: of ``FLAGS``.
        out: the JSON file to write.
        environments: where environments of peers are kept; beside the cached models if None.
    """
    from contender import measure
    from foreign import measure_foreign
    from large_tasks import ALL_TASKS
    from truth import SIZES

    task = ALL_TASKS[task_name]()
    small = "--small" in flags
    if small and task_name not in SIZES:
        task = replace(task, train=task.train.head(SMALL[0]), queries=task.queries.head(SMALL[1]))
        model = task.untrained().eval()
    else:
        model = task.trained()
    how = {"small": small, "freeze": "--collect" not in flags}
    if contender in FOREIGN:
        places = {} if environments is None else {"environments": environments}
        result = measure_foreign(contender, task, model, **how, **places)
    else:
        file, _, name = {**OURS, **PEERS}[contender].partition(":")
        method = getattr(importlib.import_module(file), name)
        with tempfile.TemporaryDirectory() as scratch:
            result = measure(method, task, model, Path(scratch), **how)
    out.write_text(json.dumps(asdict(result)), encoding="utf-8")


def spawn(contender: str, task_name: str, words: list[str]) -> dict[str, object]:
    """Measure one contender on one task in a fresh process on one thread.

    Args:
        contender: one of ``CONTENDERS``.
        task_name: a key of ``large_tasks.ALL_TASKS``.
        words: of the command line, passed on.

    Returns:
        The result as a dictionary, with ``error`` instead of figures if the process failed.
    """
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        own = [sys.executable, str(HERE / "peers.py"), "--one", contender, task_name, str(out)]
        done = subprocess.run(
            [*own, *words],
            env={**os.environ, **single},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            error = reason[0].removeprefix("foreign.LeftOutError: ")
            return {"contender": contender, "task": task_name, "error": error}
        result: dict[str, object] = json.loads(out.read_text(encoding="utf-8"))
        return result


def main() -> None:
    """Run the chosen contenders on the chosen tasks, print tables, write a JSON file."""
    from large_tasks import ALL_TASKS, CONVERGED, solve
    from report import load, render, save

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", choices=list(ALL_TASKS), default=DEFAULT_TASKS)
    parser.add_argument("--contenders", nargs="*", choices=list(CONTENDERS), default=DEFAULT)
    for flag, meaning in FLAGS.items():
        parser.add_argument(flag, action="store_true", help=meaning)
    parser.add_argument("--json", type=Path, default=HERE / ".cache" / "results.json")
    parser.add_argument("--add", action="store_true", help="keep what the file holds of other pairs")
    parser.add_argument("--environments", type=Path, help="where environments of peers are kept")
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "TASK", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    flags = [flag for flag in FLAGS if getattr(arguments, flag.removeprefix("--"))]
    if arguments.one:
        run_one(arguments.one[0], arguments.one[1], flags, Path(arguments.one[2]), arguments.environments)
        return
    if not arguments.small:
        # Here and once: no contender's process pays for it.
        for name in arguments.tasks:
            ALL_TASKS[name]().trained()
            if name in CONVERGED:
                solve(ALL_TASKS[name]())
    words = [*flags, *(["--environments", str(arguments.environments)] if arguments.environments else [])]
    found = load(arguments.json) if arguments.add else {}
    for task_name in arguments.tasks:
        for contender in arguments.contenders:
            found[contender, task_name] = spawn(contender, task_name, words)
            save(list(found.values()), arguments.json)
        render([found[contender, task_name] for contender in arguments.contenders])
    print(f"Results: {arguments.json}")


if __name__ == "__main__":
    main()
