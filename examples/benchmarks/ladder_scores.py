"""Linear datamodeling scores of the ladder: grids, intervals, paired differences, the target."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from ladder_answers import AUTO, Bench, Damping, Rung, rungs_of
from torch import Tensor
from truth import Truth

from lightning_influence.evaluation.lds import linear_datamodeling_score, predict_subsets

DRAWS = 300
# Each step drops one thing; all of them of exact columns.
STEPS = (
    ("hessian", "ggn", "network curvature"),
    ("ggn", "block_ggn", "cross-layer terms"),
    ("block_ggn", "ekfac", "eigenbasis"),
    ("ekfac", "kfac", "eigenvalues"),
    ("kfac", "diagonal", "rotation"),
    ("diagonal", "identity", "all curvature"),
)


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its 95% bootstrap interval over subsets."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    """A rung against one ground truth.

    Attributes:
        rung: its name.
        grid: LDS at each damping of the rung's grid, with that at ``"auto"``; nothing where it refused.
        auto: at ``damping="auto"``, None if it refused.
        best: at the best damping of ``grid``, chosen on this same truth: an optimistic bound.
        best_damping: which one that is.
        refused: why there is no answer at some damping.
    """

    rung: str
    grid: dict[Damping, float]
    auto: Interval | None
    best: Interval | None
    best_damping: Damping | None
    refused: dict[Damping, str]


def interval(scores: Tensor, truth: Truth) -> Interval:
    """Return the LDS of scores ``(Q, N)`` with its interval."""
    return Interval(*truth.lds(scores, bootstrap=DRAWS))


def paired(first: Tensor, second: Tensor, truth: Truth) -> Interval:
    """Difference of two LDS under one and the same resampling of the subsets.

    Args:
        first: scores ``(Q, N)``.
        second: scores that are subtracted.
        truth: subsets and values.

    Returns:
        ``LDS(first) - LDS(second)`` with its interval.
    """
    predicted = [predict_subsets(scores.double(), truth.masks) for scores in (first, second)]
    observed = truth.losses.double().mean(1)

    def difference(rows: Tensor) -> float:
        pair = [linear_datamodeling_score(each[rows], observed[rows])[0] for each in predicted]
        return float(pair[0] - pair[1])

    count = len(observed)
    generator = torch.Generator().manual_seed(0)
    value = difference(torch.arange(count))
    draws = [difference(torch.randint(count, (count,), generator=generator)) for _ in range(DRAWS)]
    spread = torch.tensor(draws, dtype=torch.float64)
    # Centred, as the score's own interval is: resampled subsets repeat, which lowers every correlation.
    low, high = (spread - spread.mean() + value).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Interval(value, low, high)


def score_rung(bench: Bench, rung: Rung, truth: Truth, measurement: str, *, intervals: bool = True) -> Row:
    """Score a rung at every damping.

    Args:
        bench: the task.
        rung: the rung.
        truth: of the measurement.
        measurement: what is scored.
        intervals: whether to resample subsets.

    Returns:
        The figures.
    """
    grid: dict[Damping, float] = {}
    refused: dict[Damping, str] = {}
    found: dict[Damping, Tensor] = {}
    for damping in (AUTO, *rung.grid):
        answer = bench.answer(rung, damping, measurement)
        if answer.scores is None:
            refused[damping] = answer.facts["error"]
            continue
        found[damping] = answer.scores
        grid[damping] = truth.lds(answer.scores, bootstrap=2)[0]
    best = max(grid, key=lambda key: grid[key]) if grid else None
    auto = interval(found[AUTO], truth) if intervals and AUTO in found else None
    at_best = auto if best == AUTO else None
    if intervals and best is not None and at_best is None:
        at_best = interval(found[best], truth)
    return Row(rung.name, grid, auto, at_best, best, refused)


def score_task(bench: Bench, fraction: float, measurement: str) -> list[Row]:
    """Score every rung and solver of a task against one ground truth."""
    truth = bench.entry.truth(fraction, measurement)
    return [score_rung(bench, rung, truth, measurement) for rung in rungs_of(bench.entry, measurement)]


@dataclass(frozen=True)
class Step:
    """What one step down the ladder costs.

    Attributes:
        above: the rung above.
        below: the rung below.
        drops: what the step leaves out.
        own: LDS of the rung above less that of the one below, each at its own best damping.
        same: the same difference with both at the Gauss-Newton matrix's best damping.
        share: ``own`` over the whole fall from the Gauss-Newton matrix to K-FAC, None outside of it.
    """

    above: str
    below: str
    drops: str
    own: Interval
    same: Interval
    share: float | None


def score_steps(bench: Bench, rows: list[Row], fraction: float, measurement: str) -> list[Step]:
    """Differences of adjacent rungs.

    Args:
        bench: the task.
        rows: of :func:`score_task`.
        fraction: of the ground truth.
        measurement: of the ground truth.

    Returns:
        The steps whose rungs the task has.
    """
    truth = bench.entry.truth(fraction, measurement)
    rungs = {rung.name: rung for rung in rungs_of(bench.entry)}
    by_name = {row.rung: row for row in rows}
    common = by_name["ggn"].best_damping
    common = bench.damping_of(rungs["ggn"]) if common == AUTO else common

    def scores(name: str, *, same: bool) -> Tensor:
        # The identity takes no damping.
        damping = common if same and rungs[name].grid else by_name[name].best_damping
        return bench.scores(rungs[name], damping, measurement)

    def best(name: str) -> float:
        row = by_name[name]
        return max(row.grid.values())

    inner = {"ggn", "block_ggn", "ekfac", "kfac"}
    fall = best("ggn") - best("kfac")
    steps = []
    names = [name for name in ("hessian", "ggn", "block_ggn", "ekfac", "kfac", "diagonal", "identity")]
    present = [name for name in names if name in by_name]
    drops = {(above, below): text for above, below, text in STEPS}
    for above, below in pairwise(present):
        own, same = (paired(scores(above, same=s), scores(below, same=s), truth) for s in (False, True))
        share = own.value / fall if above in inner and below in inner and fall > 0 else None
        text = drops.get((above, below), "cross-layer terms and eigenbasis")
        steps.append(Step(above, below, text, own, same, share))
    return steps


@dataclass(frozen=True)
class Target:
    """Untuned ``auto`` against the Gauss-Newton matrix at its own best damping.

    Attributes:
        fraction: of the ground truth.
        measurement: of the ground truth.
        auto: LDS of ``method="auto", damping="auto"``.
        exact: LDS of the Gauss-Newton matrix at its best damping.
        exact_damping: that damping.
        gap: ``exact - auto``, paired.
        damping_part: what the damping loses: the matrix at its best less the matrix at ``"auto"``.
        solver_part: what the solver loses at the same damping: the matrix at ``"auto"`` less ``auto``.
        steps: block Krylov steps that ``auto`` took.
        multiples: LDS of ``auto`` at multiples of its own damping.
    """

    fraction: float
    measurement: str
    auto: Interval
    exact: Interval
    exact_damping: Damping
    gap: Interval
    damping_part: float
    solver_part: float
    steps: int
    multiples: dict[float, float]


def score_target(bench: Bench, rows: list[Row], fraction: float, measurement: str) -> Target:
    """Compare ``auto`` with the exact matrix.

    Args:
        bench: the task.
        rows: of :func:`score_task`.
        fraction: of the ground truth.
        measurement: of the ground truth.

    Returns:
        The gap and its two parts, which add up to it.
    """
    truth = bench.entry.truth(fraction, measurement)
    rungs = {rung.name: rung for rung in rungs_of(bench.entry)}
    by_name = {row.rung: row for row in rows}
    exact, auto = by_name["ggn"], by_name["auto"]
    if exact.best is None or exact.best_damping is None or auto.auto is None:
        raise ValueError(f"No target for {bench.entry.name}: {exact.refused} {auto.refused}")
    best = bench.scores(rungs["ggn"], exact.best_damping, measurement)
    answer = bench.scores(rungs["auto"], AUTO, measurement)
    facts = bench.answer(rungs["auto"], AUTO, measurement).facts
    own = bench.damping_of(rungs["auto"])
    found = {
        factor: bench.scores(rungs["auto"], factor * own, measurement) for factor in bench.entry.multiples
    }
    multiples = {1.0: auto.grid[AUTO], **{f: truth.lds(s, bootstrap=2)[0] for f, s in found.items()}}
    return Target(
        fraction,
        measurement,
        auto.auto,
        exact.best,
        exact.best_damping,
        paired(best, answer, truth),
        exact.grid[exact.best_damping] - exact.grid[AUTO],
        exact.grid[AUTO] - auto.grid[AUTO],
        max(facts.get("krylov_steps", [0])),
        multiples,
    )
