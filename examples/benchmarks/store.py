"""A gradient store: what building and asking it takes, and how near its scores are to EK-FAC's.

``OMP_NUM_THREADS=1 python examples/benchmarks/store.py`` prints for each number of kept numbers the seconds
of building and asking in plain epochs over the same examples in the same run, and beside the scores of the
store those from as many random projections (Gaussian, of all whitened coordinates) and from as many
coordinates without principal directions. ``--tasks digits_cnn`` takes another task.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import process_time

import torch
from rich.console import Console
from rich.table import Table
from tasks import Task, TaskModule, digits_cnn, digits_mlp
from torch import Tensor

from lightning_influence import InfluenceModule, InfluenceWarning
from lightning_influence.methods.gradient_store import GradientStore
from lightning_influence.methods.kept_coordinates import choose_coordinates
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers

TASKS: dict[str, Callable[[], Task]] = {"digits_mlp": digits_mlp, "digits_cnn": digits_cnn}
_REPEATS = 3


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, default=[256, 1024, 4096])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits_mlp"])
    parser.add_argument("--examples", type=int, help="take the first training examples alone")
    parser.add_argument("--untrained", action="store_true", help="do not train the model, to try the script")
    return parser.parse_args(arguments)


def correlate_ranks(found: Tensor, exact: Tensor) -> float:
    """Return Spearman's correlation of scores ``(Q, N)``, the mean over queries; scores have no ties."""
    ranks = [scores.argsort(dim=1).argsort(dim=1).double() for scores in (found, exact)]
    one, other = (rank - rank.mean(dim=1, keepdim=True) for rank in ranks)
    return float(((one * other).sum(dim=1) / (one.norm(dim=1) * other.norm(dim=1))).mean())


def measure(run: Callable[[], object]) -> float:
    """Return the CPU seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(_REPEATS):
        start = process_time()
        run()
        seconds.append(process_time() - start)
    return min(seconds)


def run_epoch(module: TaskModule, loader: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Run a plain forward and backward pass over all batches."""
    for inputs, targets in loader:
        module.zero_grad()
        torch.autograd.backward(module.loss(module(inputs), targets))
    module.zero_grad()


def whiten(
    store: GradientStore, model: TaskModule, queries: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return what a store that cuts nothing has of the queries and of the training examples, ``(., P)``."""
    forward = Forward(find_layers(model))
    parts = [
        store.kept.take(forward(model, batch, len(batch[0])).loss_gradients())[0].detach()
        for batch in queries
    ]
    return torch.cat(parts), store.rows * store.scales[:, None]


def describe(exact: Tensor, found: Tensor) -> str:
    """Return the rank correlation, and the relative error in norm."""
    return f"{correlate_ranks(found, exact):.3f} ({float((found - exact).norm() / exact.norm()):.2g})"


def study(task: Task, numbers: Sequence[int], *, trained: bool = True) -> Table:
    """Return the table of one task."""
    model = task.trained() if trained else task.untrained().eval()
    module, train, queries = InfluenceModule(model), task.pass_loader(), task.pass_loader(task.queries)
    module.fit_factors(train)
    exact = module.scores(train, queries, method="ekfac", low_rank_tolerance=0.0).scores
    assert exact is not None
    epoch = measure(lambda: run_epoch(model, train))
    without = measure(lambda: module.scores(train, queries, method="ekfac")) / epoch
    table = Table(
        title=f"{task.name}: {len(task.train)} examples, {len(task.queries)} queries; a plain epoch takes "
        f"{epoch:.3g} s, scores by ekfac {without:.2g} epochs; in brackets relative errors"
    )
    for column in ("numbers", "bytes", "building", "asking", "store", "told", "coordinates", "random"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        whole = module.build_store(train, path / "whole", numbers=10**9, dtype=torch.float32)
        asked, rows = whiten(whole, model, queries)
        kept = whole.kept.kept
        for count in numbers:
            building = measure(partial(module.build_store, train, path / "cut", numbers=count))
            store = GradientStore.load(path / "cut")
            asking = measure(partial(module.ask_store, store, queries))
            found = module.ask_store(store, queries).scores
            assert found is not None
            fewer = choose_coordinates(whole.kept.inverse, count).kept
            chosen = torch.cat([torch.isin(places, fewer[name]) for name, places in kept.items()])
            draws = torch.randn(rows.shape[1], count, generator=torch.Generator().manual_seed(0))
            draws /= count**0.5
            table.add_row(
                f"{store.told['numbers']}",
                f"{store.bytes_per_example}",
                f"{building / epoch:.3g}",
                f"{asking / epoch:.2g}",
                describe(exact, found),
                f"{store.told['rank_correlation']:.3f} ({store.told['relative_error']:.2g})",
                describe(asked @ rows.T, asked[:, chosen] @ rows[:, chosen].T),
                describe(asked @ rows.T, (asked @ draws) @ (rows @ draws).T),
            )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of each task."""
    options = read_options(arguments)
    warnings.simplefilter("ignore", InfluenceWarning)
    console = Console(width=140)
    for name in options.tasks:
        task = TASKS[name]()
        if options.examples is not None:
            task = replace(task, train=task.train.head(options.examples))
        console.print(study(task, options.numbers, trained=not options.untrained))


if __name__ == "__main__":
    main()
