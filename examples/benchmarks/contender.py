"""One harness for every method: stages, timed and weighed in a process of their own.

A :class:`Contender` names its stages; :func:`measure` runs them. The unit of time is one plain
forward+backward epoch over the same loader in the same process. Both are CPU seconds: on one thread the
wall-clock of an idle machine, without the neighbours of a busy one. Short stages are repeated and the best
taken. Memory is the high-water mark of resident memory in the stage, less what was resident before the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from floors import floors
from tasks import Task, TaskModule
from torch import Tensor, nn
from truth import SIZES, truth

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


@dataclass(frozen=True)
class Result:
    """All measurements of one contender on one task."""

    contender: str
    task: str
    settings: dict[str, str]
    num_train: int
    num_queries: int
    epoch_seconds: float
    baseline_mib: float
    stages: list[StageResult] = field(default_factory=list)
    lds: tuple[float, float, float] | None = None
    relative_error: float | None = None


class Contender(ABC):
    """A method under test. Subclasses import their library at the top of their own file.

    Args:
        task: data and batch sizes; ``task.train`` and ``task.queries`` are what is attributed.
        model: the trained module, to be left as it is.
        scratch: an empty directory that is deleted afterwards.
    """

    name: ClassVar[str]

    def __init__(self, task: Task, model: TaskModule, scratch: Path) -> None:
        self.task, self.model, self.scratch = task, model, scratch

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Stages in the order in which they run: factors, then scores, then self-influence."""

    @abstractmethod
    def scores(self) -> Tensor | None:
        """Scores ``(Q, N)``, positive where an example helps; None if only a part of them was computed."""

    def settings(self) -> dict[str, str]:
        """What a reader needs in order to repeat the measurement."""
        return {}

    def relative_error(self) -> float | None:
        """Relative error of the scores against the method's own exact form, where it has one."""
        return None


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


def plain_epoch(task: Task, model: nn.Module) -> float:
    """CPU seconds of one forward+backward epoch over ``task.pass_loader()``: the unit of the rest."""
    loader = task.pass_loader()

    def epoch() -> None:
        for inputs, targets in loader:
            model.zero_grad()
            outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
            torch.autograd.backward(loss)

    best = min(timed(epoch)[1] for _ in range(5))
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


def measure(
    contender: type[Contender],
    task: Task,
    model: TaskModule,
    scratch: Path,
    *,
    small: bool = False,
    freeze: bool = True,
) -> Result:
    """Run all stages of a contender in this process.

    Args:
        contender: the class to measure.
        task: possibly cut to fewer examples.
        model: the trained model.
        scratch: an empty directory.
        small: score against the small ground truth.
        freeze: keep the objects that imports left out of the garbage collections that a method starts.

    Returns:
        Times, memory and, on the digits tasks, the linear datamodeling score.
    """
    torch.set_num_threads(1)
    candidate = contender(task, model, scratch)
    gc.collect()
    if freeze:
        # A method that collects garbage in a stage walks all imported objects: on small models that is most
        # of its time, and depends on what else the process has imported.
        gc.freeze()
    before = plain_epoch(task, model)
    floor, baseline = floors(task, model), _resident()
    raw = [_run(s, len(task.train), floor.get(s.name), baseline, before) for s in candidate.stages()]
    # A neighbour on the machine slows an epoch too: the best of before and after is the unit.
    epoch = min(before, plain_epoch(task, model))
    stages = [StageResult(**{**asdict(r), "epochs": r.cpu_seconds / epoch}) for r in raw]
    scores, lds = candidate.scores(), None
    if scores is not None and task.name in SIZES:
        lds = truth(task, small=small).lds(scores)
    return Result(
        contender=contender.name,
        task=task.name,
        settings=candidate.settings(),
        num_train=len(task.train),
        num_queries=len(task.queries),
        epoch_seconds=epoch,
        baseline_mib=baseline,
        stages=stages,
        lds=lds,
        relative_error=candidate.relative_error(),
    )
