"""Steps, query groups and precision of block Krylov in ``auto``: residuals, orthogonality and quality.

``python examples/benchmarks/krylov.py`` solves the queries of each task from the coarse space that ``auto``
builds, with 0 to 3 steps, in groups of several sizes, and in three precisions: float32 with inner products
summed in float64 (what the library does), float32 throughout, and float64 (from the same coarse space, which
was made in float32). ``--small`` takes an untrained model, few examples and no ground truth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from influence_contender import Auto
from ladder_tasks import LADDER, LadderTask
from rich.console import Console
from rich.table import Table
from tasks import TensorTable
from torch import Tensor

from lightning_influence.curvature.operators import GaussNewtonOperator
from lightning_influence.curvature.two_level import TwoLevel
from lightning_influence.linalg import block_krylov as krylov
from lightning_influence.linalg import orthonormal
from lightning_influence.methods.closed_form import invert_blocks, take_eigenvalues
from lightning_influence.methods.gathering import GradientPass
from lightning_influence.model.layers.plan import LayerPlan, Layout, find_layers
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.running.reading import prepare_train
from lightning_influence.running.runner import Runner

STEPS = (0, 1, 2, 3)
GROUPS = (1, 8, 20, 60, 0)
LONG = 8
SMALL = (96, 12)
PRECISIONS = ("float32", "float32 inner products", "float64")


@dataclass(frozen=True)
class Place:
    """What an operator is made from."""

    runner: Runner
    plan: LayerPlan
    train: IndexedLoader


@dataclass(frozen=True)
class Row:
    """One setting: relative residuals, loss of orthogonality ``max |Q Q^T - I|``, CPU seconds and scores."""

    residuals: Tensor
    orthogonality: float
    seconds: float
    scores: Tensor


class Problem:
    """The systems of a task's queries: right-hand sides, products, preconditioner and coarse space.

    Args:
        entry: the task.
        small: take :data:`SMALL` examples and queries, and an untrained model.
    """

    def __init__(self, entry: LadderTask, *, small: bool = False) -> None:
        task = entry.task
        if small:
            task = replace(task, train=task.train.head(SMALL[0]), queries=task.queries.head(SMALL[1]))
        self.task = task
        self.model = task.untrained().eval() if small else task.trained()
        with tempfile.TemporaryDirectory() as scratch:
            module = Auto(task, self.model, Path(scratch)).module
        answer = module.scores(task.pass_loader(), task.pass_loader(task.queries), method="auto", max_steps=0)
        assert module.state.factors is not None
        assert module.state.coarse is not None
        self.model.eval()
        self.plan, self.space = find_layers(self.model), module.state.coarse
        self.layout = Layout.of(self.plan.layers)
        damping = answer.diagnostics.damping
        self.inverse = invert_blocks(self.layout, module.state.factors, damping, take_eigenvalues)
        self.damping = self.layout.expand(damping, self.space.directions)

    def solve(self, steps: int, group: int, precision: str = "float32") -> Row:
        """Return answers after some steps, the queries in groups; ``group=0`` for all at once."""
        dtype = torch.float64 if precision == "float64" else torch.float32
        with ExitStack() as stack:
            stack.callback(self.model.to, torch.float32)
            if precision == "float32 inner products":
                plain: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a @ b.T).double()  # noqa: E731
                for module in (krylov, orthonormal):
                    stack.enter_context(patch.object(module, "inner", plain))
            runner = stack.enter_context(LoopRunner(self.model.to(dtype)))
            train = self._loader(self.task.train, dtype)
            queries, gradients = (
                self._dense(runner, x) for x in (self._loader(self.task.queries, dtype), train)
            )
            operator = GaussNewtonOperator(Place(runner, self.plan, train))
            inverse = replace(
                self.inverse, layers={k: v.to(dtype=dtype) for k, v in self.inverse.layers.items()}
            )
            damping, directions = self.damping.to(dtype), self.space.directions.to(dtype)
            start = directions, self.space.product.to(dtype) + damping * directions

            def product(vectors: Tensor) -> Tensor:
                return operator.product(vectors) + damping * vectors

            before, found, orthogonality = time.process_time(), [], 0.0
            if not steps:
                space = replace(
                    self.space,
                    directions=directions,
                    product=self.space.product.to(dtype),
                    probe_product=self.space.probe_product.to(dtype),
                )
                found = [TwoLevel(inverse, space).solve(queries)]
                orthogonality = _orthogonality(directions)
            for vectors in torch.split(queries, group or len(queries)) if steps else ():
                subspace = krylov.Subspace(vectors, start)
                result = krylov.block_krylov(product, inverse.apply, subspace, max_steps=steps, tolerance=0.0)
                orthogonality = max(orthogonality, _orthogonality(subspace.basis))
                found.append(result.solutions)
            seconds = time.process_time() - before
            solutions = torch.cat(found)
            residuals = (queries - product(solutions)).norm(dim=1) / queries.norm(dim=1)
        return Row(residuals, orthogonality, seconds, solutions @ gradients.T / len(gradients))

    def _dense(self, runner: Runner, loader: IndexedLoader) -> Tensor:
        one_pass = GradientPass(self.plan)
        runner.run(one_pass, [loader])
        return self.layout.dense(one_pass.gradients)[0]

    def _loader(self, table: TensorTable, dtype: torch.dtype) -> IndexedLoader:
        cast = TensorTable(*(x.to(dtype) if x.is_floating_point() else x for x in table.tensors))
        return prepare_train(self.task.pass_loader(cast))


def _orthogonality(basis: Tensor) -> float:
    gram = basis.double() @ basis.double().T
    return float((gram - torch.eye(len(gram), dtype=torch.float64, device=gram.device)).abs().max())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tasks", nargs="*", choices=list(LADDER), default=["digits_mlp", "digits_cnn", "diabetes"]
    )
    parser.add_argument(
        "--groups", nargs="*", type=int, default=list(GROUPS), help="queries at a time; 0: all"
    )
    parser.add_argument("--small", action="store_true", help="few examples, no ground truth")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in chosen.tasks:
        entry = LADDER[name]()
        problem = Problem(entry, small=chosen.small)
        truth = None if chosen.small else entry.truth(0.5, "loss")
        table = Table(
            "group", "steps", "precision", "median residual", "largest", "max |QQ'-I|", "LDS", "CPU s",
            title=f"{name}: {len(problem.task.queries)} queries, coarse space {problem.space.size}",
        )  # fmt: skip
        settings = [(group, steps, "float32") for group in chosen.groups for steps in STEPS if steps]
        settings = [(0, 0, "float32"), *settings]
        settings += [(0, steps, precision) for precision in PRECISIONS for steps in (3, LONG)]
        for group, steps, precision in dict.fromkeys(settings):
            row = problem.solve(steps, group, precision)
            lds = "-"
            if truth is not None:
                lds = f"{truth.lds(row.scores, bootstrap=0)[0]:.3f}"  # settings are compared on one truth
            residuals = row.residuals.tolist()
            cells = (
                str(group or "all"), str(steps), precision, f"{statistics.median(residuals):.2g}",
                f"{max(residuals):.2g}", f"{row.orthogonality:.1g}", lds, f"{row.seconds:.2f}",
            )  # fmt: skip
            print(name, *cells, file=sys.stderr, flush=True)  # a long run shows how far it is
            table.add_row(*cells)
        Console().print(table)


if __name__ == "__main__":
    main()
