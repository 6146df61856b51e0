"""Ground truth for the linear datamodeling score: models retrained on half of the digits, cached.

Run ``python examples/benchmarks/truth.py [--small] [task ...]``; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from stacked_training import Progress, retrain
from tasks import CACHE, TASKS, Task
from torch import Tensor

from lightning_influence.evaluation.lds import linear_datamodeling_score, predict_subsets, random_subsets

SIZES = {"digits_mlp": (100, 10), "digits_cnn": (100, 10)}
SMALL = (10, 1)
CHUNK = {"digits_mlp": 100, "digits_cnn": 20}


@dataclass(frozen=True)
class Truth:
    """Kept examples of each subset ``(M, N)`` and the queries' losses after retraining ``(M, S, Q)``."""

    masks: Tensor
    losses: Tensor

    def lds(self, scores: Tensor, bootstrap: int = 1000) -> tuple[float, float, float]:
        """Score, lower and upper end of the 95% bootstrap interval, of attribution scores ``(Q, N)``."""
        predicted = predict_subsets(scores.double().cpu(), self.masks)
        score, interval = linear_datamodeling_score(
            predicted, self.losses.double(), bootstrap=max(bootstrap, 2)
        )
        assert interval is not None
        return float(score), float(interval[0]), float(interval[1])


def truth(task: Task, *, small: bool = False, progress: Progress | None = None) -> Truth:
    """Ground truth of a digits task, from the cache where it is there.

    Args:
        task: ``digits_mlp()`` or ``digits_cnn()``.
        small: 10 subsets and one seed, the first of the full computation.
        progress: called as ``progress(done, total)`` after every chunk of runs.

    Returns:
        Masks and losses.
    """
    subsets, seeds = SMALL if small else SIZES[task.name]
    # The subsets of a small run are the first of the full run's, so that neither repeats the other's work.
    masks = random_subsets(len(task.train), SIZES[task.name][0], seed=0)[:subsets]
    losses = retrain(
        task.net,
        task.recipe,
        task.train.tensors,
        masks,
        range(seeds),
        queries=task.queries.tensors,
        cache_dir=CACHE / "truth" / task.name,
        chunk=CHUNK[task.name],
        progress=progress,
    )
    return Truth(masks, losses)


def main() -> None:
    """Compute what is missing, and say how far it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--small", action="store_true", help="10 subsets, one seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.tasks:
        start = time.perf_counter()

        def report(done: int, total: int, name: str = name, start: float = start) -> None:
            print(f"{name}: {done} of {total} runs after {time.perf_counter() - start:.0f} s", flush=True)

        result = truth(TASKS[name](), small=arguments.small, progress=report)
        spread = result.losses.mean(1).std(0).mean()
        print(f"{name}: losses {tuple(result.losses.shape)}, spread {spread:.4f}")


if __name__ == "__main__":
    main()
