"""Which damping suits EK-FAC itself: shares of a layer's mean eigenvalue and of the training run's damping.

Run ``python examples/benchmarks/closed_damping.py``, about five minutes on one core. Each line is one rule:
its linear datamodeling scores on the small tasks of ``studies.py`` with their mean, and its rank correlation
with converged CG (at the run's damping) on the tasks of ``large_tasks.py`` that two slow cores can take.
``--studies`` and ``--tasks`` make it shorter; ``--tasks digits_mlp digits_cnn`` has the digits' full truth.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from contender import judge
from damping import score_of
from large_tasks import ALL_TASKS, fresh_module
from rich.console import Console
from rich.table import Table
from spectra import recorded
from studies import STUDIES
from tasks import Task
from torch import Tensor

from lightning_influence import InfluenceModule
from lightning_influence.curvature import damping
from lightning_influence.curvature.state import InfluenceState

SHARES = [
    (0.03, 0.0),
    (0.01, 0.003),
    (0.01, 0.01),
    (0.03, 0.03),
    (0.03, 0.1),
    (0.0, 0.01),
    (0.0, 1.0),
]


@contextlib.contextmanager
def closed_shares(shares: tuple[float, float]) -> Iterator[None]:
    """A context in which ``damping="auto"`` of closed forms takes these shares."""
    before = damping.CLOSED_FORM
    damping.CLOSED_FORM = shares
    try:
        yield
    finally:
        damping.CLOSED_FORM = before


def score_under(module: InfluenceModule, task: Task, rules: list[tuple[float, float]]) -> Iterator[Tensor]:
    """Yield EK-FAC's scores ``(Q, N)`` under each rule, from the same factors.

    Args:
        module: the trained model with the record of its run.
        task: its data.
        rules: the shares.

    Yields:
        Scores of all queries.
    """
    for rule in rules:
        with closed_shares(rule):
            loaders = task.pass_loader(), task.pass_loader(task.queries)
            scores = module.scores(*loaders, method="ekfac").scores
        assert scores is not None
        yield scores


def judge_study(name: str, rules: list[tuple[float, float]]) -> list[float]:
    """Return the linear datamodeling score under each rule on one of ``STUDIES``."""
    study = STUDIES[name]()
    truth, (model, record) = study.truth(), recorded(study.task, 0)
    module = InfluenceModule(model, state=InfluenceState(record=record))
    return [score_of(scores, truth) for scores in score_under(module, study.task, rules)]


def judge_task(name: str, rules: list[tuple[float, float]]) -> list[float]:
    """Return the quality under each rule on one of ``ALL_TASKS``, as ``peers.py`` judges it."""
    task = ALL_TASKS[name]()
    found = []
    for scores in score_under(fresh_module(task, task.trained()), task, rules):
        lds, correlation = judge(task, scores)
        quality = correlation if lds is None else lds[0]
        assert quality is not None
        found.append(quality)
    return found


def render(rules: list[tuple[float, float]], columns: dict[str, list[float]], studies: list[str]) -> Table:
    """One line a rule, with the mean over the studies."""
    table = Table("of eigenvalue", "of run", *columns, "mean of studies")
    for number, (of_mean, of_run) in enumerate(rules):
        values = [column[number] for column in columns.values()]
        mean = sum(columns[name][number] for name in studies) / max(len(studies), 1)
        table.add_row(f"{of_mean:g}", f"{of_run:g}", *(f"{value:.3f}" for value in values), f"{mean:.3f}")
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", nargs="*", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--tasks", nargs="*", choices=list(ALL_TASKS), default=["language_small", "resnet10"])
    given = parser.parse_args()
    columns = {name: judge_study(name, SHARES) for name in given.studies}
    columns |= {name: judge_task(name, SHARES) for name in given.tasks}
    Console(width=200).print(render(SHARES, columns, given.studies))


if __name__ == "__main__":
    main()
