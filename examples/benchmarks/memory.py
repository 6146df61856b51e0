"""What answers take in memory beyond the model and its data: all scores, and rankings within a budget.

    OMP_NUM_THREADS=1 python examples/benchmarks/memory.py [method ...]

Each line is a process of its own, whose resident memory is sampled every 3 ms; the base is taken after a
small question of the same kind, so that what libraries take once does not count. Two models: one of few
parameters with 5,000 queries of 20,000 examples, and one whose query gradients are 47 times the budget.
"""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import psutil
import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule

BUDGET = 64 * 2**20
METHODS = ["identity", "ekfac", "auto", "cg"]
# Inputs, hidden units, queries, examples, and how many scores are kept at either end (None for all).
SIZES: list[tuple[int, int, int, int, int | None]] = [
    (10, 16, 5000, 20000, None),
    (10, 16, 5000, 20000, 10),
    (300, 512, 500, 2000, 10),
]
_RESULT = "RESULT "


class Net(LightningModule):
    """A two-layer MLP."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 5))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def make_loader(count: int, inputs: int, seed: int) -> DataLoader[Any]:
    """Return random examples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator)
    y = torch.randint(5, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=min(count, 500))


class Peak:
    """Samples the resident memory of this process, in MiB, while in its block."""

    def __enter__(self) -> Peak:
        gc.collect()
        self._process, self._ended = psutil.Process(), threading.Event()
        self.base = self.highest = self._read()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.003):
            self.highest = max(self.highest, self._read())

    def _read(self) -> float:
        return float(self._process.memory_info().rss) / 2**20


def measure(method: str, number: int) -> dict[str, Any]:
    """Return what one question takes."""
    inputs, hidden, queries, examples, k = SIZES[number]
    options: dict[str, Any] = {"method": method, "top_k": k, "memory_budget": BUDGET, "damping": 0.1}
    options |= {"max_steps": 3} if method == "cg" else {}
    small = make_loader(20, inputs, 3)
    InfluenceModule(Net(inputs, hidden)).scores(small, small, **options)
    loaders = make_loader(examples, inputs, 1), make_loader(queries, inputs, 2)
    module = InfluenceModule(Net(inputs, hidden))
    start = time.process_time()
    with Peak() as peak:
        found = module.scores(*loaders, **options)
    kept = 4 * queries * examples if found.scores is not None else 24 * queries * found.stored
    return {
        "peak": peak.highest - peak.base,
        "answer": kept / 2**20,
        "seconds": time.process_time() - start,
        "passes": len(found.diagnostics.passes),
    }


def main() -> None:
    """Measure in processes of their own, and print a table."""
    if sys.argv[1:2] == ["--one"]:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        print(_RESULT + json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return
    columns = (
        "method",
        "parameters",
        "queries",
        "examples",
        "kept",
        "peak, MiB",
        "answer, MiB",
        "CPU s",
        "passes",
    )
    table = Table(*columns, title=f"Memory beyond the model and its data; budget {BUDGET / 2**20:g} MiB")
    for number, (inputs, hidden, queries, examples, k) in enumerate(SIZES):
        for method in sys.argv[1:] or METHODS:
            command = [sys.executable, __file__, "--one", method, str(number)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = json.loads(told[told.index(_RESULT) + len(_RESULT) :])
            numel = (inputs + 1) * hidden + (hidden + 1) * 5
            kept = "all" if k is None else f"{k} at either end"
            told_of = (f"{found[name]:.1f}" for name in ("peak", "answer", "seconds"))
            table.add_row(
                method, f"{numel:,}", f"{queries:,}", f"{examples:,}", kept, *told_of, str(found["passes"])
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
