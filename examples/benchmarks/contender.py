"""One harness for every method: stages, timed and weighed in a process of their own.

A :class:`Contender` names its stages; :func:`measure` runs them as ``meter.py`` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from floors import floors
from large_tasks import CONVERGED, correlate_with_converged
from meter import Stage, StageResult, run_stages, time_epoch
from tasks import Task, TaskModule
from torch import Tensor
from truth import SIZES, truth


@dataclass(frozen=True)
class Result:
    """All measurements of one contender on one task.

    Attributes:
        lds: linear datamodeling score with its interval, where there are retrained models.
        correlation: mean rank correlation of the first queries' scores with those of converged CG, elsewhere.
        relative_error: of the scores against the method's own exact form, where it has one.
        untuned: ``lds[0]`` or ``correlation`` of a peer left at its own defaults, where it was tuned.
    """

    contender: str
    task: str
    settings: dict[str, str]
    num_train: int
    num_queries: int
    epoch_seconds: float
    baseline_mib: float
    stages: list[StageResult] = field(default_factory=list)
    lds: tuple[float, float, float] | None = None
    correlation: float | None = None
    relative_error: float | None = None
    untuned: float | None = None


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


def judge(
    task: Task, scores: Tensor, *, small: bool = False
) -> tuple[tuple[float, float, float] | None, float | None]:
    """Quality of scores ``(Q, N)``, positive where an example helps.

    Args:
        task: what was attributed.
        scores: of all its queries.
        small: against the small ground truth.

    Returns:
        The linear datamodeling score with its interval, where there are retrained models, and the rank
        correlation with converged CG, where that is kept.
    """
    if task.name in SIZES:
        return truth(task, small=small).lds(scores), None
    if task.name in CONVERGED and not small:
        return None, correlate_with_converged(task, scores)
    return None, None


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
    candidate = contender(task, model, scratch)
    stages, epoch, baseline = run_stages(
        candidate.stages(),
        len(task.train),
        floors(task, model),
        lambda: time_epoch(task.pass_loader(), model),
        freeze=freeze,
    )
    scores = candidate.scores()
    lds, correlation = (None, None) if scores is None else judge(task, scores, small=small)
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
        correlation=correlation,
        relative_error=candidate.relative_error(),
    )
