"""Damping rules of the damping study on the ladder's tasks: which would have met the target?

The matrix is the exact Gauss-Newton matrix, so that the rule is all that differs. The rules were chosen on
the tasks of ``studies.py``, among which are the digits MLP and the diabetes regression at one half.
"""

from __future__ import annotations

from dataclasses import dataclass

from damping_rules import RULES, Facts
from ladder_answers import GRID, Bench
from ladder_matrices import rotated
from torch import Tensor, zeros
from truth import Truth

from lightning_influence.evaluation.lds import linear_datamodeling_score, predict_subsets

CLOSE = 0.01


@dataclass(frozen=True)
class RuleRow:
    """One ground truth.

    Attributes:
        fraction: share of the examples that are kept.
        measurement: what is measured.
        r: mean squared gradient over the trace of the curvature.
        best: LDS at the best damping of the grid or of a rule.
        gaps: by rule, how far it is below ``best``.
    """

    fraction: float
    measurement: str
    r: float
    best: float
    gaps: dict[str, float]


def apply_rules(bench: Bench) -> list[RuleRow]:
    """Score every rule on a dense task trained with SGD, where one number is the damping of all layers.

    Args:
        bench: the task.

    Returns:
        A row a ground truth.
    """
    entry, source = bench.entry, bench.source
    found = rotated(source, "ggn", entry.measurements)
    values, like = found.values.clamp(min=0), zeros((), dtype=found.values.dtype)
    layers = {name: source.record.layers[name] for name in source.layout.shapes}
    w = source.layout.expand({name: layer.weight_decay for name, layer in layers.items()}, like)
    u = source.layout.expand({name: layer.metric / layer.rate for name, layer in layers.items()}, like)
    squares = found.train.square().mean(0)
    rows = []
    for measurement in entry.measurements:
        for fraction in entry.fractions:
            truth = entry.truth(fraction, measurement)

            def score(damping: float, measurement: str = measurement, truth: Truth = truth) -> float:
                predicted = predict_subsets(found.scores(damping, measurement), truth.masks)
                return float(linear_datamodeling_score(predicted, truth.losses.double())[0])

            facts = Facts(w, u, fraction, values, squares, len(found.train))
            scores = {name: score(_one(rule(facts))) for name, rule in RULES.items()}
            best = max(*scores.values(), *(score(damping) for damping in GRID))
            rows.append(
                RuleRow(fraction, measurement, facts.r, best, {n: best - s for n, s in scores.items()})
            )
    return rows


def _one(damping: Tensor) -> float:
    """Return the number that all parameters share.

    Raises:
        NotImplementedError: if they share none, as with Adam.
    """
    if float(damping.max() - damping.min()) > 1e-6 * float(damping.max()):
        raise NotImplementedError("The ladder's tasks are trained with SGD, which damps all layers alike.")
    return float(damping.mean())
