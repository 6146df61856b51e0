"""Past the final Gauss-Newton matrix: unrolling the run in segments, and exponential filters, in LDS.

Run ``python examples/benchmarks/unrolling_study.py [task ...] [--subspace] [--draws M] [--small]``. All rows
of a task are scored on the same retrained models (loss, half of the data kept), with differences to untuned
``auto`` under one resampling of the subsets:

- ``auto``, ``ekfac`` (all classes): the public calls with nothing tuned;
- ``inverse``: the final matrix at the best damping of a grid, and ``filter``: the exponential filter on it;
- ``unrolled``: segments with the mean curvature and gradients of their checkpoints (see ``unrolling.py``).

The matrix is the exact Gauss-Newton matrix, dense, or for the CNN in a subspace that holds the queries' and
training gradients and their preconditioned images; or that of EK-FAC. ``T`` is the run's own effective time;
rows at a fraction of it are there because retrained models take fewer steps. The best of several rows is
chosen on the truth that it is scored on. ``--subspace`` uses the subspace where the matrix would fit, too: it
tells what the projection loses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import ladder_scores
import torch
from damping import GRID
from ladder_scores import Interval, interval, paired
from ladder_tasks import LADDER, LadderTask
from rich.console import Console
from rich.table import Table
from snapshots import Checkpoint, snapshots
from torch import Tensor
from truth import Truth
from unrolling import (
    Curvature,
    DenseCurvature,
    FactoredCurvature,
    ProjectedCurvature,
    Segment,
    average_factored,
    unroll,
)

from lightning_influence.curvature.operators import GaussNewtonOperator

SEGMENTS, EACH = 3, 2
TIMES = (1.0, 0.5, 0.25)
TRAIN_DIRECTIONS = 128


@dataclass(frozen=True)
class Row:
    """A way to score: its LDS, and how far it is above that of ``auto``."""

    name: str
    lds: Interval
    gain: Interval


def curvatures(parts: list[list[Checkpoint]], dense: bool) -> list[Curvature]:
    """The mean Gauss-Newton matrix of each segment, then that of the last checkpoint alone.

    Args:
        parts: checkpoints of each segment.
        dense: whether to form the matrices.

    Returns:
        As many curvatures as there are segments, and one.
    """
    groups = [*parts, parts[-1][-1:]]
    if dense:
        return [DenseCurvature(_mean([one.matrix("ggn") for one in group])) for group in groups]
    basis = subspace([group[-1] for group in parts])
    products = {id(one): GaussNewtonOperator(one).product(basis) for group in parts for one in group}
    return [ProjectedCurvature(basis, _mean([products[id(one)] for one in group])) for group in groups]


def subspace(checkpoints: list[Checkpoint]) -> Tensor:
    """Orthonormal rows ``(m, P)`` in which functions of every segment's matrix act on the queries.

    They span the queries' gradients ``V``, two block Krylov steps ``P^{-1} V`` and ``P^{-1} G P^{-1} V`` at
    the last checkpoint and one at the others, and preconditioned training gradients of each.
    """
    last = checkpoints[-1]
    queries = last.gradients(last.task.queries).float()
    start = last.ekfac.apply(queries)
    rows = [queries, start, last.ekfac.apply(GaussNewtonOperator(last).product(start))]
    rows += [one.ekfac.apply(queries) for one in checkpoints[:-1]]
    order = torch.randperm(len(last.task.train), generator=torch.Generator().manual_seed(0))
    chosen = order[:TRAIN_DIRECTIONS]
    rows += [one.ekfac.apply(one.gradients_of_train[chosen].float()) for one in checkpoints]
    vectors = torch.cat(rows).double()
    vectors /= vectors.norm(dim=1, keepdim=True)
    _, sizes, right = torch.linalg.svd(vectors, full_matrices=False)
    return right[sizes > 1e-6 * sizes[0]].float()


def segments(
    parts: list[list[Checkpoint]], found: list[Curvature], decay: float, share: float
) -> list[Segment]:
    """Segments of a run at a share of its effective time."""
    ends = [0.0, *(group[-1].time for group in parts)]
    return [
        Segment(share * (end - start), decay, curvature, _mean([one.gradients_of_train for one in group]))
        for group, curvature, start, end in zip(parts, found, ends[:-1], ends[1:], strict=False)
    ]


def candidates(entry: LadderTask, epochs: list[int]) -> dict[str, Tensor | list[Tensor]]:
    """Scores of every row by name; a list where the best one counts.

    Args:
        entry: the task.
        epochs: of the checkpoints, :data:`EACH` a segment; the last of each ends it.

    Returns:
        Scores ``(Q, N)``.
    """
    run = [Checkpoint(entry.task, one) for one in snapshots(entry.task, epochs)]
    parts = [run[start : start + EACH] for start in range(0, len(run), EACH)]
    last, decay = run[-1], entry.task.recipe.weight_decay
    found: dict[str, Tensor | list[Tensor]] = {
        "auto": last.ask("auto"),
        "ekfac": last.ask("ekfac", fisher="exact"),
    }
    queries = last.gradients(entry.task.queries)
    factored = [FactoredCurvature(average_factored(last.layout, [one.ekfac for one in g])) for g in parts]
    kinds: dict[str, list[Curvature]] = {
        "ggn": curvatures(parts, entry.dense),
        "ekfac": [*factored, FactoredCurvature(last.ekfac)],
    }
    for kind, matrices in kinds.items():
        final = matrices[-1]
        found[f"{kind}, inverse, best damping"] = [
            _scores(final, lambda h, d=damping: 1 / (h + d), queries, last) for damping in GRID
        ]
        whole = [Segment(last.time, decay, final, last.gradients_of_train)]
        for share in TIMES:
            found[f"{kind}, filter, {share:g} T"] = unroll(
                [replace(whole[0], time=share * last.time)], queries
            )
            found[f"{kind}, unrolled, {share:g} T"] = unroll(segments(parts, matrices, decay, share), queries)
    return found


def _scores(
    curvature: Curvature, function: Callable[[Tensor], Tensor], queries: Tensor, last: Checkpoint
) -> Tensor:
    train = last.gradients_of_train
    return curvature.apply(function, queries) @ train.T / len(train)


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(0) if len(parts) > 1 else parts[0]


def measure(found: dict[str, Tensor | list[Tensor]], truth: Truth) -> list[Row]:
    """Score every row, and its distance to ``auto``."""
    rows = []
    auto = found["auto"]
    assert isinstance(auto, Tensor)
    for name, scores in found.items():
        if isinstance(scores, list):
            scores = max(scores, key=lambda each: truth.lds(each, bootstrap=2)[0])
        rows.append(Row(name, interval(scores, truth), paired(scores, auto, truth)))
    return rows


def render(rows: list[Row], title: str) -> Table:
    """Return a table of LDS and gains."""
    table = Table("scores", "LDS", "above auto", title=title, caption="95% intervals over subsets")
    for row in rows:
        table.add_row(row.name, str(row.lds), str(row.gain))
    return table


def small_task() -> LadderTask:
    """The regression cut down to 64 examples, 10 queries, 8 subsets and six epochs: a smoke run."""
    entry = LADDER["diabetes"]()
    task = replace(
        entry.task,
        recipe=replace(entry.task.recipe, epochs=6),
        train=entry.task.train.head(64),
        queries=entry.task.queries.head(10),
    )
    return replace(entry, task=task, fractions=(0.5,), subsets=8, seeds=1)


def checkpoint_epochs(entry: LadderTask) -> list[int]:
    """Evenly spaced epochs, :data:`EACH` for each of :data:`SEGMENTS` segments."""
    count, total = SEGMENTS * EACH, entry.task.recipe.epochs
    return [round(total * (number + 1) / count) for number in range(count)]


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each task.

    Args:
        arguments: of the command line; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["diabetes", "digits_mlp", "digits_cnn"])
    parser.add_argument("--draws", type=int, default=300, help="bootstrap resamples")
    parser.add_argument("--subspace", action="store_true", help="no dense matrices: what the subspace costs")
    parser.add_argument("--small", action="store_true", help="a smoke run, whose figures mean nothing")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ladder_scores.DRAWS = chosen.draws
    console = Console()
    if not console.is_terminal:
        console.width = 110
    for entry in [small_task()] if chosen.small else [LADDER[name]() for name in chosen.tasks]:
        entry = replace(entry, dense=entry.dense and not chosen.subspace)
        found = candidates(entry, checkpoint_epochs(entry))
        console.print(render(measure(found, entry.truth(0.5, "loss")), f"{entry.name}, half kept, loss"))


if __name__ == "__main__":
    main()
