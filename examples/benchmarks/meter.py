"""Stages, timed and weighed. It needs torch alone: peers with environments of their own are measured alike.

The unit of time is one plain forward+backward epoch over the same examples in the same process. Both are CPU
seconds: on one thread the wall-clock of an idle machine, without the neighbours of a busy one. Short stages
are repeated and the best taken. Memory is the high-water mark of resident memory in the stage, less what was
resident before the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Group = Literal["factors", "scores", "self-influence"]
REPEAT_BELOW = 2.0
REPEATS = 3


@dataclass(frozen=True)
class Stage:
    """One timed step.

    Attributes:
        name: shown in the report; the floor of that name is shown beside it.
        group: what it belongs to.
        run: does the work for the first ``count`` training examples; may be called more than once.
        sizes: the counts to run: one, the whole training set, or two smaller ones, which are extrapolated to
            the whole by the straight line through them.
    """

    name: str
    group: Group
    run: Callable[[int], object]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StageResult:
    """Measured stage: seconds and epochs for the whole training set, and how they were got."""

    name: str
    group: Group
    seconds: float
    cpu_seconds: float
    epochs: float
    floor_epochs: float | None
    peak_mib: float
    sizes: tuple[int, ...]
    measured_cpu_seconds: tuple[float, ...]


class TensorTable(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and targets in memory; a batch is one indexing operation, so that loading hides nothing."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.tensors = (inputs, targets)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tensors[0][index], self.tensors[1][index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(indices)
        return self.tensors[0][index], self.tensors[1][index]

    def head(self, count: int) -> TensorTable:
        """The first ``count`` examples."""
        return TensorTable(*(tensor[:count] for tensor in self.tensors))


def as_batch(batch: Any) -> Any:
    """Collate function of :class:`TensorTable`, which hands over whole batches."""
    return batch


def _status(key: str) -> float | None:
    """Return a memory figure of this process in MiB, or None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)


def _resident() -> float:
    """Return resident memory in MiB, after giving back what the allocator holds in reserve."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _reset_peak() -> None:
    # Where the system refuses, the mark holds for the process so far: an upper bound for this stage.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> float:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Best wall-clock and CPU seconds of ``run``, repeated while it is short."""
    walls: list[float] = []
    cpus: list[float] = []
    while len(walls) < REPEATS and sum(walls) < REPEAT_BELOW:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def time_epoch(loader: Iterable[Any], model: nn.Module) -> float:
    """CPU seconds of one forward+backward epoch of cross-entropy over a loader: the unit of the rest."""

    def epoch() -> None:
        for inputs, targets in loader:
            model.zero_grad()
            outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
            torch.autograd.backward(loss)

    best = timed(epoch)[1]
    for _ in range(4 if best < REPEAT_BELOW / 10 else 1):
        best = min(best, timed(epoch)[1])
    model.zero_grad()
    return best


def _line(counts: tuple[int, ...], values: list[float], total: int) -> float:
    """Return the value at ``total``: measured there, or on the line through two measured points."""
    if len(values) == 1:
        return values[0]
    slope = (values[1] - values[0]) / (counts[1] - counts[0])
    return values[1] + slope * (total - counts[1])


def _run(stage: Stage, total: int, floor: float | None, baseline: float, epoch: float) -> StageResult:
    _resident()
    _reset_peak()
    times = [timed(partial(stage.run, count)) for count in stage.sizes]
    peak = _peak() - baseline
    wall, cpu = (_line(stage.sizes, [pair[i] for pair in times], total) for i in (0, 1))
    measured = tuple(pair[1] for pair in times)
    return StageResult(stage.name, stage.group, wall, cpu, cpu / epoch, floor, peak, stage.sizes, measured)


def run_stages(
    stages: list[Stage], total: int, floor: dict[str, float], epoch: Callable[[], float], *, freeze: bool
) -> tuple[list[StageResult], float, float]:
    """Run stages in this process, in order.

    Args:
        stages: what to run.
        total: number of training examples.
        floor: epochs that a stage of this name cannot do without.
        epoch: measures a plain epoch.
        freeze: keep the objects that imports left out of the garbage collections that a method starts.

    Returns:
        The measured stages, CPU seconds of the plain epoch, and MiB that were resident before.
    """
    torch.set_num_threads(1)
    gc.collect()
    if freeze:
        # A method that collects garbage in a stage walks all imported objects: on small models that is most
        # of its time, and depends on what else the process has imported.
        gc.freeze()
    before, baseline = epoch(), _resident()
    raw = [_run(stage, total, floor.get(stage.name), baseline, before) for stage in stages]
    # A neighbour on the machine slows an epoch too: the best of before and after is the unit.
    unit = min(before, epoch())
    return [replace(result, epochs=result.cpu_seconds / unit) for result in raw], unit, baseline
