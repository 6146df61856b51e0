"""The side of a peer with an environment of its own: it reads a job, measures, and writes scores.

A job is a folder with ``job.json`` and ``tensors.pt`` (tensors alone: weights, training examples, queries);
the answer is ``result.json`` and ``scores.pt``. This file needs torch alone, and no other library of the
process that wrote the job.
"""

from __future__ import annotations

import importlib
import json
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from meter import Stage, TensorTable, as_batch, run_stages, time_epoch
from torch import Tensor, nn
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Job:
    """What is attributed: the trained network in eval mode, its data, and the batch size of a plain pass."""

    task: str
    net: nn.Module
    train: TensorTable
    queries: TensorTable
    pass_batch: int
    scratch: Path

    @property
    def tokens(self) -> bool:
        """Whether every position has a label."""
        return self.train.tensors[1].ndim > 1

    def loader(self, table: TensorTable, size: int | None = None) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of ``size`` examples in order."""
        return DataLoader(table, size or self.pass_batch, collate_fn=as_batch)


class Peer(ABC):
    """A method of a peer. Scores are its own; their scale does not matter, their sign does.

    Args:
        job: what is attributed.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    name: ClassVar[str]
    # The setting of `scores` that is the peer's own default.
    untuned: ClassVar[str]

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Stages in the order in which they run: factors, then scores, then self-influence."""

    @abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """Scores ``(Q, N)`` by setting, positive where an example helps; ``untuned`` is one of them."""

    def settings(self) -> dict[str, str]:
        """What a reader needs in order to repeat the measurement."""
        return {}


class UnansweredError(Exception):
    """A peer does not answer for a class of models; the message says why."""


def example_loss(outputs: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    """Cross-entropy, of each example the mean over its positions, summed over the batch or its mean."""
    loss = nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    return loss * len(targets) if reduction == "sum" else loss


def read(folder: Path) -> tuple[Job, dict[str, Any]]:
    """Read a job.

    Args:
        folder: where it lies.

    Returns:
        The job, and what ``job.json`` says.
    """
    said = json.loads((folder / "job.json").read_text("utf-8"))
    tensors = torch.load(folder / "tensors.pt", weights_only=True)
    net = getattr(importlib.import_module(said["module"]), said["net"])()
    net.load_state_dict(tensors["weights"])
    scratch = folder / "scratch"
    scratch.mkdir()
    tables = (TensorTable(*tensors[name]) for name in ("train", "queries"))
    return Job(said["task"], net.eval(), *tables, said["pass_batch"], scratch), said


def main(methods: dict[str, type[Peer]]) -> None:
    """Measure the method that the job names, and write the answer.

    Args:
        methods: of the peer, by name.
    """
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    job, said = read(folder)
    try:
        peer = methods[said["method"]](job)
    except UnansweredError as reason:
        (folder / "result.json").write_text(json.dumps({"error": str(reason)}), "utf-8")
        return
    stages, epoch, baseline = run_stages(
        peer.stages(),
        len(job.train),
        {},
        lambda: time_epoch(job.loader(job.train), job.net),
        freeze=said["freeze"],
    )
    result = {
        "contender": peer.name,
        "settings": peer.settings(),
        "epoch_seconds": epoch,
        "baseline_mib": baseline,
        "stages": [asdict(stage) for stage in stages],
        "untuned": peer.untuned,
    }
    torch.save(peer.scores(), folder / "scores.pt")
    (folder / "result.json").write_text(json.dumps(result), "utf-8")
