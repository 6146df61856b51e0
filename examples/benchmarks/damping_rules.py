"""Rules for the damping, from the recorded run and the spectrum, against the best value of a fine grid.

Run ``python examples/benchmarks/damping_rules.py``. Most rules were written down while looking at the tasks
of ``studies.py``: their figures there are what a rule was *chosen* on. The variants below (other subset
fractions, run lengths, decay, optimizer) came later and are the fairer test, though they share the data. The
rules marked ``*`` were added after the variants' results had been seen: nothing here is held out for them.

``w`` is the decay's damping, ``u = 1 / sum(rate)`` the run's (each times Adam's metric where there is one),
``a`` the subset fraction, ``r`` the mean squared gradient over the trace of the curvature: about 1 for a
model that fits its data no better than it must, near 0 for one that interpolates.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from damping import score_of, scores_at
from rich.console import Console
from rich.table import Table
from spectra import Spectrum, recorded, spectrum
from studies import STUDIES, Study
from torch import Tensor

from lightning_influence.model.layers.plan import Layout, find_layers

FINE = [10 ** (power / 4) for power in range(-18, 5)]
CLOSE = 0.02


@dataclass(frozen=True)
class Facts:
    """What a rule may look at: ``w (P,)``, ``u (P,)``, ``a``, eigenvalues, squared gradients, ``N``."""

    w: Tensor
    u: Tensor
    a: float
    values: Tensor
    squares: Tensor
    size: int

    @property
    def r(self) -> float:
        """Mean squared gradient over the trace of the curvature."""
        return float(self.squares.sum() / self.values.sum())

    def finite_sample(self, damping: Tensor) -> Tensor:
        """Solve ``k - damping = k df(k) / (a N)`` for ``k``, ``df(k) = Tr(H (H + k)^-1)``, by its mean."""
        start = float(damping.mean())
        k = start
        for _ in range(200):
            df = float((self.values / (self.values + k)).sum())
            k = 0.5 * k + 0.5 * (start + k * min(df / (self.a * self.size), 0.9))
        return damping * (k / start)


Rule = Callable[[Facts], Tensor]
RULES: dict[str, Rule] = {
    "w + u": lambda f: f.w + f.u,
    "2 (w + u)": lambda f: 2 * (f.w + f.u),
    "3 (w + u)": lambda f: 3 * (f.w + f.u),
    "w + 2 u *": lambda f: f.w + 2 * f.u,
    "w + 4 u * (auto)": lambda f: f.w + 4 * f.u,
    "w + u/a": lambda f: f.w + f.u / f.a,
    "w + 2 u/a *": lambda f: f.w + 2 * f.u / f.a,
    "w + 3 u/a *": lambda f: f.w + 3 * f.u / f.a,
    "2 (w + u/a)": lambda f: 2 * (f.w + f.u / f.a),
    "w/a + u/a^2": lambda f: f.w / f.a + f.u / f.a**2,
    "finite sample of w + u": lambda f: f.finite_sample(f.w + f.u),
    "finite sample of w + u/a": lambda f: f.finite_sample(f.w + f.u / f.a),
    "(1 + 4 r)(w + u)": lambda f: (1 + 4 * f.r) * (f.w + f.u),
    "(1 + 6 r)(w + u)": lambda f: (1 + 6 * f.r) * (f.w + f.u),
    "(1 + r)(w + u/a)": lambda f: (1 + f.r) * (f.w + f.u / f.a),
    "(1 + 2 r)(w + u/a)": lambda f: (1 + 2 * f.r) * (f.w + f.u / f.a),
    "(1 + 3 r)(w + u/a)": lambda f: (1 + 3 * f.r) * (f.w + f.u / f.a),
    "(.5 + 2 r)(w + u/a)": lambda f: (0.5 + 2 * f.r) * (f.w + f.u / f.a),
    "(.5 + 3 r)(w + u/a)": lambda f: (0.5 + 3 * f.r) * (f.w + f.u / f.a),
    "(.5 + 4 r)(w + u/a)": lambda f: (0.5 + 4 * f.r) * (f.w + f.u / f.a),
    "w + (.5 + 4 r) u/a *": lambda f: f.w + (0.5 + 4 * f.r) * f.u / f.a,
    "2.5 sqrt(r) (w + u/a)": lambda f: 2.5 * f.r**0.5 * (f.w + f.u / f.a),
}


def _variant(base: str, tag: str, fraction: float | None = None, **recipe: Any) -> Study:
    study = STUDIES[base]()
    task = replace(study.task, name=f"{base}-{tag}", recipe=replace(study.task.recipe, **recipe))
    return Study(task, fraction or study.fraction, subsets=60, seeds=5)


_SGD = {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
HELD_OUT: dict[str, Callable[[], Study]] = {
    f"{base}-{tag}": partial(_variant, base, tag, fraction, **recipe)
    for base, tag, fraction, recipe in (
        ("digits_few", "0.8", 0.8, {}),
        ("digits_few", "0.3", 0.3, {}),
        ("digits_few", "short", None, {"epochs": 15}),
        ("digits_noisy", "0.4", 0.4, {}),
        ("digits_noisy", "long", None, {"epochs": 150}),
        ("digits_noisy", "short", None, {"epochs": 15}),
        ("digits_adam", "0.5", 0.5, {}),
        ("diabetes_sgd", "0.8", 0.8, {}),
        ("diabetes_sgd", "long", None, {"epochs": 240}),
        ("diabetes_sgd", "decay", None, {"weight_decay": 2e-2}),
        ("diabetes_adam", "0.3", 0.3, {}),
        ("diabetes_adam", "long", None, {"epochs": 200}),
        ("cancer_bce", "0.5", 0.5, {}),
        ("cancer_bce", "0.8", 0.8, {}),
        ("cancer_bce", "long", None, {"epochs": 150}),
        ("blobs_adamw", "0.8", 0.8, {}),
        ("blobs_adamw", "short", None, {"epochs": 10}),
        ("blobs_adamw", "sgd", None, _SGD),
    )
}


def facts(study: Study, found: Spectrum) -> Facts:
    """Collect what rules look at.

    Args:
        study: the task.
        found: its spectrum.

    Returns:
        The facts of the model of seed 0.
    """
    model, record = recorded(study.task)
    layout, like = Layout.of(find_layers(model).layers), torch.zeros((), dtype=torch.float64)
    run = {name: layer.metric / layer.rate for name, layer in record.layers.items()}
    adamw = record.family == "adamw"
    decay = {
        name: layer.weight_decay * (layer.metric if adamw else 1.0) for name, layer in record.layers.items()
    }
    squares = found.train.square().mean(0)
    w, u = layout.expand(decay, like), layout.expand(run, like)
    return Facts(w, u, study.fraction, found.values, squares, len(found.train))


def gaps(study: Study) -> tuple[dict[str, float], str]:
    """Score every rule on one task.

    Args:
        study: the task.

    Returns:
        What each rule is below the best value of the fine grid, and a line on the task.
    """
    truth, found = study.truth(), spectrum(study.task)
    known = facts(study, found)
    grid = [score_of(found.scores(value), truth) for value in FINE]
    best = max(grid)
    near = [value for value, score in zip(FINE, grid, strict=True) if score >= best - CLOSE]
    line = (
        f"{study.task.name}: best {best:.3f}, within {CLOSE} from {near[0]:.1e} to {near[-1]:.1e}; a "
        f"{known.a}, w {float(known.w.mean()):.1e}, u {float(known.u.mean()):.1e}, r {known.r:.2f}"
    )
    return {name: best - score_of(scores_at(found, rule(known)), truth) for name, rule in RULES.items()}, line


def _summary(values: list[float]) -> tuple[str, str, str]:
    close = sum(value <= CLOSE for value in values)
    return f"{close}/{len(values)}", f"{max(values):.3f}", f"{sum(values) / len(values):.3f}"


def main() -> None:
    """Print a line a task, and the table of rules."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    console, results = Console(width=150), {}
    for name, make in {**STUDIES, **HELD_OUT}.items():
        results[name], line = gaps(make())
        console.print(line, highlight=False)
    table = Table(title=f"{len(RULES)} rules: LDS below the best of a fine grid")
    for column in (
        "rule",
        "chosen on: close",
        "worst",
        "mean",
        "held out: close",
        "worst",
        "mean",
        "failures",
    ):
        table.add_column(column)
    for rule in RULES:
        shown = [f"{name} {gap[rule]:.3f}" for name, gap in results.items() if gap[rule] > CLOSE]
        first, second = (_summary([results[name][rule] for name in group]) for group in (STUDIES, HELD_OUT))
        table.add_row(rule, *first, *second, ", ".join(shown))
    console.print(table)


if __name__ == "__main__":
    main()
