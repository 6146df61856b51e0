"""Which vectors make the best coarse space of two-level EK-FAC: kinds compared at the same size ``m``.

Run ``python examples/benchmarks/coarse_vectors.py [task ...] [--sizes m ...] [--kinds ...] [--small]``. Half
of the queries are held out and answered without any iteration; the others are the "previous" ones. Each row
has the median relative residual of the held-out queries, their LDS (loss, half of the data kept), and what
that is above random training gradients at the same size, paired over subsets. Spaces are nested: a larger
one holds the smaller. "another draw" says how much of a difference is luck. "products" are those that
choosing a direction takes besides its own. The damping is that of ``damping="auto"``. The kinds are in
``coarse_choices.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import ladder_scores
import torch
from coarse_choices import KINDS, Problem
from ladder_scores import interval, paired
from ladder_tasks import LADDER, LadderTask
from rich.console import Console
from rich.table import Table
from torch import Tensor
from unrolling_study import small_task

from lightning_influence.curvature.two_level import TwoLevel
from lightning_influence.linalg.block_krylov import Subspace, block_krylov

SIZES = (64, 128, 256, 512)


def answers(
    problem: Problem, sizes: tuple[int, ...], kinds: Sequence[str]
) -> Iterator[tuple[int, str, Tensor]]:
    """Answers ``(Q, P)`` to the held-out queries by size and kind; one space at a time is in memory."""
    for name in kinds:
        choose, space, start = KINDS[name][0], None, 0
        for size in sizes:
            space, start = problem.grown(space, choose(problem, space, start, size)), size
            yield size, name, TwoLevel(problem.inverse, space).solve(problem.asked)


def compare(entry: LadderTask, sizes: tuple[int, ...], kinds: Sequence[str]) -> Table:
    """Measure kinds at every size.

    Args:
        entry: the task.
        sizes: of the spaces; those above half of the parameters or all training examples are left out.
        kinds: of ``KINDS``; the first is what others are compared with.

    Returns:
        A table.
    """
    most = min(len(entry.task.train), sum(p.numel() for p in entry.task.net().parameters()) // 2)
    sizes = tuple(size for size in sizes if size <= most)
    problem = Problem(entry, sizes[-1])
    found = {
        (size, name): (problem.residual(x), problem.scores(x))
        for size, name, x in answers(problem, sizes, kinds)
    }
    columns = ("m", "vectors", "products", "residual", "LDS", "above training gradients")
    table = Table(*columns, title=f"{entry.name}: two-level EK-FAC without iteration, held-out queries")
    for size in sizes:
        for name in kinds:
            extra, (relative, scores) = KINDS[name][1], found[size, name]
            first = found[size, kinds[0]][1]
            gain = "" if scores is first else str(paired(scores, first, problem.truth))
            lds = str(interval(scores, problem.truth))
            table.add_row(str(size), name, f"{extra}", f"{relative:.3f}", lds, gain)
        table.add_section()
    for name, steps in (("EK-FAC alone, same damping", 0), ("solved to .01", 40)):
        solved = problem.inverse.apply(problem.asked)
        if steps:
            options = {"max_steps": steps, "tolerance": 0.01}
            space = Subspace(problem.asked)
            solved = block_krylov(problem.system, problem.inverse.apply, space, **options).solutions
        lds = str(interval(problem.scores(solved), problem.truth))
        table.add_row("", name, "", f"{problem.residual(solved):.3f}", lds, "")
    return table


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each task.

    Args:
        arguments: of the command line; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["diabetes", "digits_mlp", "digits_cnn"])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="of the spaces")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--draws", type=int, default=300, help="bootstrap resamples")
    parser.add_argument("--small", action="store_true", help="a smoke run, whose figures mean nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ladder_scores.DRAWS = options.draws
    console = Console()
    if not console.is_terminal:
        console.width = 110
    sizes = (8, 16) if options.small else tuple(sorted(options.sizes))
    baseline = next(iter(KINDS))
    kinds = [baseline, *(name for name in options.kinds if name != baseline)]
    for entry in [small_task()] if options.small else [LADDER[name]() for name in options.tasks]:
        console.print(compare(entry, sizes, kinds))


if __name__ == "__main__":
    main()
