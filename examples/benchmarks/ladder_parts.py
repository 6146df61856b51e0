"""Parts of the ladder study without retraining: the error of each step as matrices, costs, and PBRF."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from decomposition import Comparison, compare
from ladder_answers import AUTO, Bench, rungs_of
from safetensors.torch import load_file
from tasks import save_model
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lightning_influence.evaluation import proximal_response

QUERIES = 40


def decompose(bench: Bench) -> dict[tuple[str, str], Comparison]:
    """Compare rungs as matrices, layer by layer: adjacent ones, and K-FAC with the blocks it stands for.

    Args:
        bench: a dense task.

    Returns:
        By ``(truth, approximation)`` the comparison.
    """
    names = ("hessian", "ggn", "block_ggn", "ekfac", "kfac")
    matrices = {name: bench.source.matrix(name) for name in names}
    pairs = [*pairwise(names), ("block_ggn", "kfac")]
    return {(a, b): compare(matrices[a], matrices[b], bench.source.layout) for a, b in pairs}


@dataclass(frozen=True)
class Cost:
    """What one answer took from scratch: factors, spectrum, queries, scores.

    Attributes:
        rung: its name.
        passes: passes over data.
        epochs: examples seen in them, over the number of training examples.
        products: products with a curvature kept in memory, over full-data ones; None if the method reports
            none.
        seconds: wall-clock, on whatever else the machine was doing.
        cpu_seconds: of the process.
        residual: mean and largest relative residual, None for closed forms.
        note: what the method decided or left undone.
    """

    rung: str
    passes: int
    epochs: float
    products: int | None
    seconds: float
    cpu_seconds: float
    residual: tuple[float, float] | None
    note: str


def costs(bench: Bench) -> list[Cost]:
    """Read the certificates of every rung's answer for the loss at ``damping="auto"``."""
    rows = []
    for rung in rungs_of(bench.entry):
        facts = bench.answer(rung, AUTO).facts
        if "error" in facts:
            rows.append(Cost(rung.name, 0, 0.0, None, 0.0, 0.0, None, facts["error"]))
            continue
        residual = None
        if facts["residual_mean"] is not None:
            residual = (facts["residual_mean"], facts["residual_max"])
        steps = facts.get("krylov_steps")
        solver = facts.get("solver", {})
        note = f"{max(steps)} block steps for {facts.get('krylov_queries')} queries" if steps else ""
        if "coarse_space" in facts:
            note = f"coarse space {facts['coarse_space']}; {note or 'no block step'}"
        if "steps" in solver:
            note = f"{max(solver['steps'])} steps"
        if facts["warnings"]:
            note = f"{note}; {facts['warnings'][0]}"
        rows.append(
            Cost(
                rung.name,
                facts["passes"],
                facts["epochs"],
                solver.get("products"),
                facts["seconds"],
                facts["cpu_seconds"],
                residual,
                note,
            )
        )
    return rows


@dataclass(frozen=True)
class Agreement:
    """A rung against proximal Bregman responses.

    Attributes:
        rung: its name.
        removal: mean over training examples of Pearson's correlation, over queries, with the response to
            removing the example.
        removal_ranks: the same with Spearman's.
        derivative: Pearson's with the response to a hundredth of that step.
        error: relative error of the scores against that derivative.
    """

    rung: str
    removal: float
    removal_ranks: float
    derivative: float
    error: float


def responses(bench: Bench, damping: float, examples: list[int]) -> tuple[Tensor, Tensor]:
    """Responses ``(Q, M)`` of the first queries' losses to removing examples, and their derivative; cached.

    Args:
        bench: the task.
        damping: of the proximal term.
        examples: training indices.

    Returns:
        For the whole step, and for a hundredth of it in the unit of the whole.
    """
    task = bench.entry.task
    path = bench.folder / f"pbrf-{damping:.6g}-{'-'.join(map(str, examples))}.safetensors"
    if not path.exists():
        tables = []
        for tensors in (task.train.tensors, tuple(t[:QUERIES] for t in task.queries.tensors)):
            tables.append(tuple(t.double() if t.is_floating_point() else t for t in tensors))
        count, net = len(task.train), bench.source.module.net.double()
        try:
            found = {
                name: proximal_response(
                    net,
                    tables[0],
                    tables[1],
                    examples,
                    damping=damping,
                    loss=task.example_loss,
                    epsilon=-scale / count,
                    tolerance=1e-6,
                ).scores.contiguous()
                for name, scale in (("removal", 1.0), ("derivative", 0.01))
            }
        finally:
            bench.source.module.net.float()
        save_model(found, path)
    stored = load_file(path)
    return stored["removal"], stored["derivative"]


def agree(bench: Bench, damping: float, count: int) -> list[Agreement]:
    """Correlate every rung's scores with the responses to some training examples.

    Args:
        bench: the task.
        damping: of the responses and of the rungs.
        count: number of training examples, spread over the training set.

    Returns:
        One row a rung; those that refuse, and those whose grid does not hold the damping, are left out.
    """
    total = len(bench.entry.task.train)
    examples = torch.linspace(0, total - 1, count).long().tolist()
    removal, derivative = responses(bench, damping, examples)
    rows = []
    for rung in rungs_of(bench.entry):
        if rung.grid and damping not in rung.grid:
            continue
        # The identity takes no damping.
        found = bench.answer(rung, damping if rung.grid else AUTO).scores
        if found is None:
            continue
        scores = found[:QUERIES][:, examples]
        error = float((scores - derivative).norm() / derivative.norm())
        ranks = float(spearman_corrcoef(scores.double(), removal.double()).mean())
        rows.append(Agreement(rung.name, pearson(scores, removal), ranks, pearson(scores, derivative), error))
    return rows


def pearson(first: Tensor, second: Tensor) -> float:
    """Mean over columns of the correlation of columns ``(Q, M)``."""
    first, second = (each - each.mean(0) for each in (first.double(), second.double()))
    return float(((first * second).sum(0) / (first.norm(dim=0) * second.norm(dim=0))).mean())
