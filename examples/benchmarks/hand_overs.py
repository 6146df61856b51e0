"""How far a call walks through the package: rooms, floors, files touched, and calls that cross files.

    python examples/benchmarks/hand_overs.py

The walks are counted by ``sys.setprofile`` on a two-layer MLP, 64 training examples in four batches and 8
queries. Calls are counted where a function of one file of the package calls one of another file;
comprehensions are not functions here.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_influence
from lightning_influence import InfluenceCallback, InfluenceTrainer

ROOT = Path(lightning_influence.__file__).parent
_NO_FUNCTIONS = {"<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>"}


class Net(LightningModule):
    """A two-layer MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), 0.1)


class Walk:
    """Counts the files that a call touches, and the calls that cross from one to another."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.arrows: Counter[tuple[str, str, str]] = Counter()

    def follow(self, action: Callable[[], Any]) -> None:
        """Run something under the profiler."""
        sys.setprofile(self._note)
        try:
            action()
        finally:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        name, root = frame.f_code.co_filename, f"{ROOT}/"
        if event != "call" or not name.startswith(root) or frame.f_code.co_name in _NO_FUNCTIONS:
            return
        self.files.add(name)
        caller = frame.f_back.f_code.co_filename if frame.f_back else ""
        if caller.startswith(root) and caller != name:
            self.arrows[caller[len(root) :], name[len(root) :], frame.f_code.co_name] += 1


def main() -> None:
    """Walk, and print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--top", type=int, default=0, help="also print so many of the busiest arrows")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
    train, queries = DataLoader(data, 16), DataLoader(Subset(data, range(8)), 8)
    off = dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False
    )
    trainer, net = InfluenceTrainer(max_epochs=2, callbacks=[InfluenceCallback()], **off), Net()
    trainer.fit(net, train)
    walks: dict[str, Callable[[], Any]] = {
        'influence(method="ekfac")': lambda: trainer.influence(net, train, queries, method="ekfac"),
        "influence()": lambda: trainer.influence(net, train, queries),
        "forget": lambda: trainer.forget(list(range(4)), net, train),
    }
    table = Table("walk", "files", "rooms", "calls across files")
    console = Console()
    for name, action in walks.items():
        walk = Walk()
        walk.follow(action)
        rooms = {Path(file).relative_to(ROOT).parts[0] for file in walk.files}
        table.add_row(name, str(len(walk.files)), str(len(rooms)), str(walk.arrows.total()))
        for (caller, called, function), count in walk.arrows.most_common(arguments.top):
            console.print(f"{count:6} {caller} -> {called} {function}", highlight=False)
    console.print(table)
    lines = sum(len(path.read_text().splitlines()) for path in ROOT.rglob("*.py"))
    console.print(f"{len(list(ROOT.rglob('*.py')))} files, {lines} lines")


if __name__ == "__main__":
    main()
