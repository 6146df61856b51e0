"""Which damping suits EK-FAC itself: shares of a layer's mean eigenvalue and of the training run's damping.

Run ``python examples/benchmarks/closed_damping.py``, about five minutes on one core. Each line is one rule:
its linear datamodeling scores on the small tasks of ``studies.py`` with their mean, and its rank correlation
with converged CG (at the run's damping) on the tasks of ``large_tasks.py`` that two slow cores can take.
``--studies`` and ``--tasks`` make it shorter.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from damping import score_of
from large_tasks import CONVERGED_QUERIES, LARGE, correlate_with_converged, fresh_module
from rich.console import Console
from rich.table import Table
from spectra import recorded
from studies import STUDIES

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


def study_scores(name: str, rules: list[tuple[float, float]]) -> list[float]:
    """Linear datamodeling scores of EK-FAC under each rule.

    Args:
        name: of ``STUDIES``.
        rules: the shares.

    Returns:
        One score a rule.
    """
    study = STUDIES[name]()
    truth, (model, record) = study.truth(), recorded(study.task, 0)
    module = InfluenceModule(model, state=InfluenceState(record=record))
    found = []
    for rule in rules:
        with closed_shares(rule):
            queries = study.task.pass_loader(study.task.queries)
            scores = module.scores(study.task.pass_loader(), queries, method="ekfac").scores
        assert scores is not None
        found.append(score_of(scores, truth))
    return found


def task_correlations(name: str, rules: list[tuple[float, float]]) -> list[float]:
    """Rank correlations of EK-FAC with converged CG under each rule.

    Args:
        name: of ``LARGE``.
        rules: the shares.

    Returns:
        One correlation a rule.
    """
    task = LARGE[name]()
    module, few = fresh_module(task, task.trained()), task.pass_loader(task.queries.head(CONVERGED_QUERIES))
    found = []
    for rule in rules:
        with closed_shares(rule):
            scores = module.scores(task.pass_loader(), few, method="ekfac").scores
        assert scores is not None
        found.append(correlate_with_converged(task, scores))
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
    parser.add_argument("--tasks", nargs="*", choices=list(LARGE), default=["language_small", "resnet10"])
    given = parser.parse_args()
    columns = {name: study_scores(name, SHARES) for name in given.studies}
    columns |= {name: task_correlations(name, SHARES) for name in given.tasks}
    Console(width=200).print(render(SHARES, columns, given.studies))


if __name__ == "__main__":
    main()
