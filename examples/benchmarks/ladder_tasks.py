"""Tasks of the ladder study, with retrained models measured in their loss and, for classes, their margin.

Each retrained model is measured once in everything that the study scores, so that a second measurement costs
no second retraining. The digits tasks also draw on the larger ground truth that the other benchmarks use.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from nets import LETTERS, PASSAGE, SmallTransformer
from recipes import Recipe
from stacked_training import Progress, retrain
from studies import STUDIES
from tasks import CACHE, Task, TensorTable, digits_cnn, digits_mlp, token_cross_entropy
from torch import Tensor
from truth import CHUNK, SIZES, Truth

from lightning_influence.evaluation.lds import random_subsets
from lightning_influence.evaluation.losses import cross_entropy, squared_error

FRACTIONS = (0.3, 0.5, 0.7, 0.9)


def loss_and_margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies of ``B`` examples, then the log-odds of their true labels, ``(2 B,)``."""
    index = targets.unsqueeze(-1)
    others = outputs.scatter(-1, index, float("-inf")).logsumexp(-1)
    margins = outputs.gather(-1, index).squeeze(-1) - others
    return torch.cat([cross_entropy(outputs, targets), margins])


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": loss_and_margin,
    "tokens": token_cross_entropy,
    "mse": squared_error,
}


@dataclass(frozen=True)
class LadderTask:
    """A task of the study.

    Attributes:
        task: data, model and recipe.
        fractions: shares of the examples that retrained models keep.
        measurements: what is scored.
        dense: whether the curvature is small enough for a dense matrix.
        multiples: of ``auto``'s own damping at which it is scored as well.
        subsets: number of subsets at each fraction.
        seeds: number of retrained models a subset.
        shared: whether the ground truth in the loss at one half is that of the other benchmarks, which is
            larger.
    """

    task: Task
    fractions: tuple[float, ...]
    measurements: tuple[str, ...] = ("loss",)
    dense: bool = True
    multiples: tuple[float, ...] = (2.0, 3.0, 6.0, 10.0)
    subsets: int = 50
    seeds: int = 4
    shared: bool = False

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    def truth(self, fraction: float, measurement: str, progress: Progress | None = None) -> Truth:
        """Subsets and the queries' measured values, cached.

        Args:
            fraction: one of ``fractions``.
            measurement: one of ``measurements``.
            progress: called as ``progress(done, total)`` after every chunk of runs.

        Returns:
            Masks ``(M, N)`` and values ``(M, S, Q)``.
        """
        task, shared = self.task, self.shared and fraction == 0.5 and measurement == "loss"
        subsets, seeds = SIZES[task.name] if shared else (self.subsets, self.seeds)
        # The same 100 subsets whatever is asked for, of which the first count: a longer run repeats nothing.
        masks = random_subsets(len(task.train), 100, fraction, seed=0)[:subsets]
        measure = cross_entropy if shared else MEASURES[task.loss]
        values = retrain(
            task.net,
            task.recipe,
            task.train.tensors,
            masks,
            range(seeds),
            queries=task.queries.tensors,
            loss=task.example_loss,
            measurement=measure,
            cache_dir=CACHE / "truth" / task.name,
            chunk=CHUNK.get(task.name, 50),
            progress=progress,
        )
        if measure is loss_and_margin:
            values = values.unflatten(2, (2, -1))[:, :, ("loss", "margin").index(measurement)]
        return Truth(masks, values)


def passages() -> Task:
    """600 passages of 16 letters and spaces from the source text of the standard library's argparse."""
    text = Path(argparse.__file__).read_text(encoding="utf-8").lower()
    known = {letter: index for index, letter in enumerate(string.ascii_lowercase + " ")}
    assert len(known) == LETTERS
    letters = " ".join("".join(letter if letter in known else " " for letter in text).split())
    codes = torch.tensor([known[letter] for letter in letters])
    count = 600
    rows = codes[: count * (PASSAGE + 1)].view(count, PASSAGE + 1)
    rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    table = TensorTable(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    queries = TensorTable(*(tensor[500:] for tensor in table.tensors))
    recipe = Recipe(0.03, epochs=40, batch_size=25, momentum=0.9, weight_decay=1e-3)
    return Task("passages", SmallTransformer, table.head(500), queries, recipe, pass_batch=250, loss="tokens")


def _digits_mlp() -> LadderTask:
    return LadderTask(digits_mlp(), FRACTIONS, ("loss", "margin"), shared=True)


def _digits_cnn() -> LadderTask:
    return LadderTask(digits_cnn(), (0.5,), dense=False, multiples=(), shared=True)


def _diabetes() -> LadderTask:
    # A regression has no margin.
    return LadderTask(replace(STUDIES["diabetes_sgd"]().task, name="diabetes"), FRACTIONS)


def _passages() -> LadderTask:
    # 5,451 parameters, but 216,000 rows of outputs: the dense matrix takes longer than all the rest.
    return LadderTask(passages(), (0.5,), dense=False)


LADDER: dict[str, Callable[[], LadderTask]] = {
    "digits_mlp": _digits_mlp,
    "digits_cnn": _digits_cnn,
    "diabetes": _diabetes,
    "passages": _passages,
}


def main() -> None:
    """Compute the ground truth that is missing, and say how far it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(LADDER), help=f"of {', '.join(LADDER)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.tasks:
        entry = LADDER[name]()
        for fraction in entry.fractions:
            for measurement in entry.measurements:

                def report(done: int, total: int, label: str = f"{name} {fraction} {measurement}") -> None:
                    print(f"{label}: {done} of {total} runs", flush=True)

                values = entry.truth(fraction, measurement, report).losses
                spread = values.mean(1).std(0).mean()
                print(f"{name} {fraction} {measurement}: {tuple(values.shape)}, spread {spread:.4f}")


if __name__ == "__main__":
    main()
