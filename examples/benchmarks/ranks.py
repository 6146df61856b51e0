"""What factors, scores and self-influence cost by process, under DDP and with shared-out parameters (FSDP2).

    OMP_NUM_THREADS=1 python examples/benchmarks/ranks.py [--processes 1 2 4] [--width 512] [--examples 1024]

CPU time in plain epochs (forward and backward passes over the same examples, on one process), summed over the
processes and of the busiest one, and the highest resident memory that a process takes beyond what it has
after a small question of the same kind. Each line of the table is a run of its own, on the CPU by gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from memory import Peak
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceTrainer

STAGES = ("factors and scores", "self-influence")
CLASSES, DEPTH, BATCH, QUERIES = 10, 8, 128, 8


class Net(LightningModule):
    """An MLP whose layers are sharded one by one.

    Args:
        width: of every layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(DEPTH)]
        self.body = nn.Sequential(*layers, nn.Linear(width, CLASSES))

    def configure_model(self) -> None:
        """Share the parameters out, under a strategy that asks for it."""
        if self._device_mesh is None or hasattr(self.body, "unshard"):
            return
        try:
            from torch.distributed.fsdp import fully_shard
        except ImportError:  # before torch 2.6
            from torch.distributed._composable.fsdp import fully_shard
        mesh = self.device_mesh["data_parallel"]
        for part in self.body:
            fully_shard(part, mesh=mesh)
        fully_shard(self.body, mesh=mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])


def make_loader(count: int, width: int, seed: int) -> DataLoader[Any]:
    """Return random examples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def measure_epoch(width: int, examples: int) -> float:
    """Return the CPU seconds of forward and backward passes over all examples."""
    module = Net(width)
    loader = make_loader(examples, width, 1)
    module.training_step(next(iter(loader))).backward()
    start = time.process_time()
    for batch in loader:
        module.zero_grad()
        module.training_step(batch).backward()
    return time.process_time() - start


def make_trainer(strategy: str, processes: int) -> InfluenceTrainer:
    """Return a Trainer on the CPU."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    kind: Any = "ddp" if processes > 1 else "auto"
    if strategy == "fsdp":
        kind = ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
    return InfluenceTrainer(accelerator="cpu", devices=processes, strategy=kind, **dict.fromkeys(off, False))  # type: ignore[arg-type]


def measure(strategy: str, processes: int, width: int, examples: int, folder: Path) -> None:
    """Ask on as many processes; each writes what it took to a file."""
    train, queries = make_loader(examples, width, 1), make_loader(QUERIES, width, 2)
    few = make_loader(BATCH, width, 3)
    trainer, module = make_trainer(strategy, processes), Net(width)
    options: dict[str, Any] = {"method": "ekfac", "damping": 0.1, "log": False}
    trainer.influence(module, few, few, **{**options, "method": "identity"})
    found = {"epoch": measure_epoch(width, examples) if processes == 1 else 0.0}
    asks = (
        lambda: trainer.influence(module, train, queries, **options),
        lambda: trainer.self_influence(module, train, **options),
    )
    for stage, ask in zip(STAGES, asks, strict=True):
        start = time.process_time()
        with Peak() as peak:
            ask()
        found[stage] = time.process_time() - start
        found[f"{stage}, MiB"] = peak.highest - peak.base
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run(strategy: str, processes: int, width: int, examples: int) -> list[dict[str, float]]:
    """Return what each process of a run of its own took."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [str(processes), str(width), str(examples), folder]
        command = [sys.executable, __file__, "--one", strategy, *sizes]
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            timeout=1800,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def make_row(strategy: str, found: Sequence[dict[str, float]], epoch: float) -> list[str]:
    """Return a line of the table."""
    cells = [strategy, str(len(found))]
    for stage in STAGES:
        costs = [process[stage] / epoch for process in found]
        cells += [f"{sum(costs):.1f}", f"{max(costs):.1f}"]
        cells.append(f"{max(process[f'{stage}, MiB'] for process in found):.0f}")
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in processes of their own, and print a table."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--one"]:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        processes, width, examples = map(int, given[2:5])
        measure(given[1], processes, width, examples, Path(given[5]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--examples", type=int, default=1024)
    sizes = parser.parse_args(given)
    columns = [
        "strategy",
        "processes",
        *(f"{s}{part}" for s in STAGES for part in ("", ", busiest", ", MiB")),
    ]
    numel = sum(p.numel() for p in Net(sizes.width).parameters())
    table = Table(
        *columns, title=f"ekfac, {numel:,} parameters, {sizes.examples:,} x {QUERIES}; CPU in epochs"
    )
    epoch = run("one process", 1, sizes.width, sizes.examples)[0]["epoch"]
    for processes in sizes.processes:
        for strategy in ("ddp", "fsdp") if processes > 1 else ("one process",):
            found = run(strategy, processes, sizes.width, sizes.examples)
            table.add_row(*make_row(strategy, found, epoch))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
