r"""What ``auto`` is worth where parameters are many and memory is short; what ``ekfac`` costs small Llamas.

    OMP_NUM_THREADS=1 python examples/benchmarks/large_auto.py [resnet gpt vit] [--budgets MIB ...]
    OMP_NUM_THREADS=1 python examples/benchmarks/large_auto.py resnet18 gpt10m vit5m --cache FOLDER
    OMP_NUM_THREADS=1 python examples/benchmarks/large_auto.py llama64 llama128 llama128_2000 \
        --methods ekfac --solved 0 --rounds 5 --results FILE

Each model is trained briefly on made-up data that can be learned, and asked about with ``method="ekfac"`` and
with ``method="auto"`` under stated memory budgets. Quality is the relative residual, which ``auto`` reports,
and the rank correlation of scores, mean over the queries, with those of a converged ``method="cg"`` for the
first few of them (``--solved``; kept in the folder ``--cache`` if one is named). Cost is CPU time over that
of a plain epoch, forward and backward over the same training examples: factors apart, with their
eigendecompositions apart, and the answer with everything else. Memory is what the process takes above what it
held before the question, in the first of several ``--rounds``, of which the cheapest counts: sampling memory
takes time as well. ``write_page.py --json`` takes what
``--results`` writes. Sizes are options; ``--tiny`` takes seconds. Llamas need transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from large_models import SIZES, Module, Size, train
from memory import Peak
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_influence import Attributions, InfluenceModule
from lightning_influence.curvature.state import InfluenceState

TINY = {"width": 8, "depth": 1, "examples": 24, "queries": 3}
SMALL = ("resnet", "gpt", "vit")


def time_epoch(module: Module, loader: DataLoader[Any]) -> float:
    """Return CPU seconds of forward and backward passes over all training examples, the better of two."""
    seconds = []
    for _ in range(2):
        started = time.process_time()
        for batch in loader:
            module.training_step(batch).backward()
        seconds.append(time.process_time() - started)
        module.zero_grad()
    return min(seconds)


class EighClock:
    """Adds up the CPU seconds of symmetric eigendecompositions while in its block."""

    def __enter__(self) -> EighClock:
        self.seconds, self._eigh = 0.0, torch.linalg.eigh

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.process_time()
            try:
                return self._eigh(*arguments, **named)
            finally:  # also of one that does not converge, and is done again in double precision
                self.seconds += time.process_time() - started

        torch.linalg.eigh = timed
        return self

    def __exit__(self, *error: object) -> None:
        torch.linalg.eigh = self._eigh


@dataclass(frozen=True)
class Row:
    """One way of asking: what it cost in plain epochs, and how good it is."""

    model: str
    method: str
    budget_mib: float | None
    directions: int | None
    rank: int | None
    residual: float | None
    largest_residual: float | None
    correlation: float
    passes: int
    epochs: float
    peak_mib: float
    factors: float
    decompositions: float
    factors_mib: float


def correlate(one: Tensor, other: Tensor) -> float:
    """Return the mean rank correlation of the queries' scores."""
    pairs = list(zip(one.double(), other.double(), strict=True))
    return float(sum(spearmanr(a, b).statistic for a, b in pairs) / len(pairs))


def solve_few(
    fitted: InfluenceModule,
    loaders: list[DataLoader[Any]],
    count: int,
    damping: float | str,
    tolerance: float,
    folder: Path | None,
    key: str,
) -> Tensor:
    """Return converged scores of the first queries, from the folder if they are kept there.

    Args:
        fitted: the model, with factors.
        loaders: of training examples and of queries.
        count: how many queries.
        damping: of the system.
        tolerance: residual at which a query counts as solved.
        folder: keeps scores; None for none.
        key: changes with whatever the scores depend on.

    Returns:
        ``(count, N)``.
    """
    path = None if folder is None else folder / f"{key}.pt"
    if path is not None and path.exists():
        kept: Tensor = torch.load(path)
        return kept
    few = Subset(loaders[1].dataset, range(min(count, len(loaders[1].dataset))))  # type: ignore[arg-type]
    target = ask_one(
        fitted,
        [loaders[0], DataLoader(few, loaders[1].batch_size)],
        "cg",
        damping,
        tolerance=tolerance,
        max_steps=300,
        memory_budget=10 * 2**30,
    )
    residuals, dampings = target.diagnostics.residuals, target.diagnostics.damping.values()
    assert residuals is not None
    told = f"damping {min(dampings):.2g} to {max(dampings):.2g}"
    print(f"residual of cg {float(residuals.max()):.2g}, {told}", flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(target.scores, path)
    return target.scores


def study(name: str, size: Size, given: argparse.Namespace) -> list[Row]:
    """Ask one model in every way.

    Args:
        name: of the model.
        size: of the model and the data.
        given: the options of the command line.

    Returns:
        The rows.
    """
    module, loaders, record = train(size, given.epochs, given.trained)
    plain, damping = time_epoch(module, loaders[0]), given.damping
    numel = sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        losses = [
            float(sum(module.training_step(b) * len(b[0]) for b in x)) / len(x.dataset) for x in loaders
        ]  # type: ignore[arg-type]
    print(
        f"{name}: {numel:,} parameters, loss {losses[0]:.3f}, of queries {losses[1]:.3f}, {size}", flush=True
    )
    factors = decompositions = float("inf")
    peak = Peak()
    for number in range(given.rounds):
        fitted = InfluenceModule(module, state=InfluenceState(record=record))
        with EighClock() as clock, nullcontext() if number else peak:
            started = time.process_time()
            fitted.prepare(loaders[0], method="ekfac", damping=damping)
            fitting = time.process_time() - started
        factors, decompositions = min(factors, fitting - clock.seconds), min(decompositions, clock.seconds)
        plain = min(plain, time_epoch(module, loaders[0]))
    factors_mib = peak.highest - peak.base
    factors, decompositions = factors / plain, decompositions / plain
    told = f"factors {factors:.1f} and eigendecompositions {decompositions:.1f}"
    print(f"plain epoch {plain:.2f} s, {told} epochs, {factors_mib:.0f} MiB", flush=True)
    target = None
    if given.solved:
        parts = (
            name,
            size,
            given.epochs,
            damping,
            given.converged,
            [float(p.detach().sum()) for p in module.parameters()],
        )
        key = f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"
        target = solve_few(fitted, loaders, given.solved, damping, given.converged, given.cache, key)
    rows = []
    ways: list[tuple[str, float | None]] = [("identity", None), ("ekfac", None)]
    ways = [way for way in ways if way[0] in given.methods]
    ways += [("auto", budget) for budget in given.budgets if "auto" in given.methods]
    for method, budget in ways:
        options: dict[str, Any] = {}
        if budget is not None:
            options = {"memory_budget": int(budget * 2**20), "curvature_examples": given.curvature_examples}
        if given.mean:
            options["aggregate"] = "mean"
        cost, peak = float("inf"), Peak()
        for number in range(given.rounds):
            fresh = InfluenceModule(module, state=copy(fitted.state))  # factors, but no coarse space
            with nullcontext() if number else peak:
                started = time.process_time()
                found = ask_one(fresh, loaders, method, damping, **options)
                cost = min(cost, (time.process_time() - started) / plain)
        extra, told = found.diagnostics.extra, found.diagnostics.residuals
        agreement = float("nan")
        if target is not None and not given.mean:
            agreement = correlate(found.scores[: len(target)], target)
        row = Row(
            model=name,
            method=method,
            budget_mib=budget,
            directions=extra.get("coarse_space"),
            rank=extra.get("coarse_rank"),
            residual=None if told is None else float(told.median()),
            largest_residual=None if told is None else float(told.max()),
            correlation=agreement,
            passes=len(found.diagnostics.passes),
            epochs=cost,
            peak_mib=peak.highest - peak.base,
            factors=factors,
            decompositions=decompositions,
            factors_mib=factors_mib,
        )
        print(row, flush=True)
        for one in found.diagnostics.passes:
            print(f"    {one['name']}: {one['seconds'] / plain:.2f} plain epochs of wall time")
        for note in found.diagnostics.warnings:
            print("    note:", note)
        rows.append(row)
    return rows


def ask_one(
    model: InfluenceModule, loaders: list[DataLoader[Any]], method: str, damping: float | str, **options: Any
) -> Attributions:
    """Return the scores of all queries, without progress and notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.scores(*loaders, method=method, damping=damping, **options)


def show(rows: Sequence[Row]) -> None:
    """Print a table."""
    names = "model method MiB directions rank residual largest rho passes epochs peak factors eigh MiB"
    table = Table(*names.split())
    for row in rows:
        cells = asdict(row).values()
        table.add_row(*("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in cells))
    Console(width=120).print(table)


def as_result(row: Row, size: Size) -> dict[str, Any]:
    """Return a row as ``peers.py`` writes results."""
    stages = {
        "factors": (row.factors, row.factors_mib),
        "eigendecompositions": (row.decompositions, row.factors_mib),
        "scores": (row.epochs, row.peak_mib),
    }
    return {
        "contender": row.method,
        "task": row.model,
        "num_train": size.examples,
        "num_queries": size.queries,
        "stages": [{"group": g, "epochs": epochs, "peak_mib": mib} for g, (epochs, mib) in stages.items()],
    }


def read_damping(text: str) -> float | str:
    """Return a number, or the name of a rule."""
    return text if text.isalpha() else float(text)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=SMALL, help=f"of {', '.join(SIZES)}")
    parser.add_argument("--budgets", nargs="+", type=float, default=[64.0, 256.0], help="in MiB")
    parser.add_argument("--methods", nargs="+", default=["identity", "ekfac", "auto"])
    parser.add_argument("--width", type=int, help="of the model")
    parser.add_argument("--depth", type=int, help="blocks, of a stage for a ResNet")
    parser.add_argument("--examples", type=int, help="training examples")
    parser.add_argument("--queries", type=int)
    parser.add_argument("--extent", type=int, help="tokens of a sequence, or pixels of a side")
    parser.add_argument(
        "--trained", type=int, help="examples of the training, the first of which are asked about"
    )
    parser.add_argument("--solved", type=int, default=8, help="queries that cg answers; 0 for none")
    parser.add_argument(
        "--converged", type=float, default=1e-2, help="residual at which cg ends, chosen by hand"
    )
    parser.add_argument("--curvature-examples", type=int, help="for auto, which then corrects in any case")
    parser.add_argument("--mean", action="store_true", help="ask about the mean of the queries")
    parser.add_argument("--epochs", type=int, default=4, help="of training")
    parser.add_argument("--damping", type=read_damping, default=3e-3, help="a number; auto for the run's")
    parser.add_argument("--cache", type=Path, help="folder that keeps converged scores")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="of which the least cost counts")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--results", type=Path, help="file to write what write_page.py takes to")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows, results = [], []
    for name in given.models:
        size = replace(SIZES[name], **TINY) if given.tiny else SIZES[name]
        options = ("width", "depth", "examples", "queries", "extent")
        size = replace(size, **{key: getattr(given, key) or getattr(size, key) for key in options})
        found = study(name, size, given)
        rows += found
        results += [as_result(row, size) for row in found]
    show(rows)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if given.results:
        given.results.write_text(json.dumps({"results": results}, indent=1))
    return rows


if __name__ == "__main__":
    main()
