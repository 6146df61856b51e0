"""Memory of EK-FAC where factors exceed it: fitted by groups of layers and mapped from files, or all held.

    OMP_NUM_THREADS=1 python examples/benchmarks/streamed.py [--width 2048 --depth 8 --budget 128]

``--width 4096 --depth 60 --examples 256 --budget 2048 --ways groups`` is a model of a billion parameters:
its files take 20 GB of the temporary directory.

Each way is a process of its own, which fits factors of an MLP of ``depth`` square layers and scores queries.
Memory is what the process has of its own above model and data, in MiB: pages that are mapped from files are
told apart, because the system drops them where memory is short. Cost is CPU time in plain epochs, forward and
backward over the same examples; eigendecompositions apart. Linux tells the two kinds of memory apart.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import psutil
import torch
from large_auto import EighClock
from lightning.pytorch import LightningModule
from memory import Peak
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule

WAYS = ("held", "groups")
_RESULT = "RESULT "


class Net(LightningModule):
    """An MLP of wide layers, whose gradients neither vanish nor grow with depth."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [part for a, b in pairwise([width] * (depth + 1)) for part in (nn.Linear(a, b), nn.ReLU())]
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.net = nn.Sequential(*layers, nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class OwnPeak(Peak):
    """Samples the memory that is the process's own, without what is mapped from files."""

    def _read(self) -> float:
        told = psutil.Process().memory_info()
        return float(told.rss - getattr(told, "shared", 0)) / 2**20


def load(count: int, width: int, seed: int) -> DataLoader[Any]:
    """Return random examples of which a part of the inputs decides the label."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :10].argmax(1)), 128)


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Return what one way takes."""
    net, loaders = (
        Net(given.width, given.depth),
        [load(given.examples, given.width, 1), load(8, given.width, 2)],
    )
    plain = float("inf")
    for _ in range(2):
        started = time.process_time()
        for batch in loaders[0]:
            net.training_step(batch).backward()
        plain = min(plain, time.process_time() - started)
    net.zero_grad()
    with tempfile.TemporaryDirectory() as folder, EighClock() as clock, Peak() as resident, OwnPeak() as own:
        started = time.process_time()
        options = {"factors_dir": folder} if given.one == "groups" else {}
        module = InfluenceModule(net)
        found = module.scores(
            *loaders, method="ekfac", damping=1e-3, memory_budget=int(given.budget * 2**20), **options
        )
        seconds = time.process_time() - started - clock.seconds
    assert found.scores is not None
    return {
        "own": own.highest - own.base,
        "resident": resident.highest - resident.base,
        "epochs": seconds / plain,
        "decompositions": clock.seconds / plain,
        "sum": float(found.scores.double().abs().sum()),
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run the benchmark; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=128.0, help="in MiB")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        print(_RESULT + json.dumps(measure(given)))
        return []
    numel = sum(p.numel() for p in Net(given.width, given.depth).parameters())
    table = Table("factors", "own, MiB", "resident, MiB", "epochs", "decompositions", "sum of scores")
    rows = []
    for way in given.ways:
        options = [f"--{name}={getattr(given, name)}" for name in ("width", "depth", "examples", "budget")]
        command = [sys.executable, __file__, "--one", way, *options]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(told[told.index(_RESULT) + len(_RESULT) :]))
        table.add_row(way, *(f"{value:.5g}" for value in rows[-1].values()))
    table.title = f"{numel:,} parameters ({4 * numel / 2**20:.0f} MiB), memory_budget {given.budget:g} MiB"
    Console(width=120).print(table)
    return rows


if __name__ == "__main__":
    main()
