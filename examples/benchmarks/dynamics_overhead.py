"""What training dynamics cost a fit: the same fit without, with "auto" and with all, in turn.

``python examples/benchmarks/dynamics_overhead.py [--rounds 5] [task ...]``. CPU seconds on one thread; best
of several rounds on either side, because a neighbour on the machine only ever slows a fit. The spread between
the rounds of one side is shown beside: a difference below it is not resolved.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from overhead import cpu_seconds
from tasks import TASKS, fit

from lightning_influence import InfluenceCallback


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Fit a task ``rounds`` times without dynamics, with ``"auto"`` and with all of them, in turn.

    Args:
        name: of the task.
        rounds: fits of each kind.

    Returns:
        Best CPU seconds of each kind, the overheads, the epochs that ``"auto"`` kept in the last round, and
        the largest spread of best to second-best round.
    """
    task = TASKS[name]()
    fit(replace(task, recipe=replace(task.recipe, epochs=1)), 0, callbacks=[InfluenceCallback()])  # warm-up
    seconds: dict[bool | Literal["auto"], list[float]] = {False: [], True: [], "auto": []}
    for _ in range(rounds):
        for dynamics, times in seconds.items():
            callback = InfluenceCallback(dynamics=dynamics)
            times.append(cpu_seconds(task, [callback]))
    kept = callback.dynamics
    ordered = {dynamics: sorted(times) for dynamics, times in seconds.items()}
    spreads = [times[1] / times[0] - 1 for times in ordered.values() if len(times) > 1]
    steps = task.recipe.steps(len(task.train))
    return {
        "task": name,
        "steps": steps,
        "without": ordered[False][0],
        "with": ordered[True][0],
        "auto": ordered["auto"][0],
        "overhead": ordered[True][0] / ordered[False][0] - 1,
        "overhead_auto": ordered["auto"][0] / ordered[False][0] - 1,
        "epochs_auto": 0 if kept is None else kept.epochs,
        "epochs": task.recipe.epochs,
        "microseconds_a_step": 1e6 * (ordered[True][0] - ordered[False][0]) / steps,
        "spread": max(spreads, default=None),
    }


def main() -> None:
    """Measure the chosen tasks and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=["large_mlp", "digits_mlp", "digits_cnn"])
    parser.add_argument("--rounds", type=int, default=5, help="fits of each kind")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.tasks) - set(TASKS))
    if unknown:
        parser.error(f"unknown tasks {unknown}; choose of {', '.join(TASKS)}")
    torch.set_num_threads(1)
    results = [measure(name, arguments.rounds) for name in arguments.tasks]
    for result in results:
        spread = "-" if result["spread"] is None else f"{100 * result['spread']:.1f} %"
        print(
            f"{result['task']}: {result['steps']} steps, {result['without']:.2f} s without, "
            f"{result['with']:.2f} s with dynamics: {100 * result['overhead']:+.2f} %, "
            f"{result['microseconds_a_step']:.0f} microseconds a step; {result['auto']:.2f} s with 'auto': "
            f"{100 * result['overhead_auto']:+.2f} %, {result['epochs_auto']} of {result['epochs']} epochs; "
            f"spread {spread}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
