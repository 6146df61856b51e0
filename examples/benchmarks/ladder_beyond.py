"""Past the exact Gauss-Newton matrix: the Hessian in a Krylov subspace, and averages over trained models.

- *Hessian in the subspace*: block Krylov with the Gauss-Newton matrix builds an orthonormal basis ``Q``; its
  products with the Hessian take one more pass. The answer is ``Q (|Q^T H Q| + lambda)^{-1} Q^T v``, with the
  absolute eigenvalues in the subspace (Rayleigh-Ritz), which negative curvature cannot harm.
- *Seeds*: scores of models trained from other initial values, averaged.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from ladder_answers import AUTO, Bench, rungs_of
from ladder_scores import Interval, interval, paired
from safetensors.torch import load_file
from spectra import recorded
from tasks import save_model
from torch import Tensor

from lightning_influence import InfluenceModule
from lightning_influence.curvature.operators import GaussNewtonOperator, HessianOperator
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.linalg.block_krylov import Subspace, block_krylov
from lightning_influence.methods.closed_form import invert_blocks, take_eigenvalues

SEEDS = 3
STEPS = 3


@dataclass(frozen=True)
class Variant:
    """A variant's LDS, and how far it is above that of ``auto``, paired over subsets."""

    name: str
    lds: Interval
    gain: Interval


def variants(bench: Bench) -> list[Variant]:
    """Measure every variant, for the loss at one half, with the damping that ``auto`` takes.

    Args:
        bench: the task.

    Returns:
        A row a variant; ``auto`` and the dense rungs are among them where the task has them.
    """
    truth = bench.entry.truth(0.5, "loss")
    rungs = {rung.name: rung for rung in rungs_of(bench.entry)}
    auto = bench.scores(rungs["auto"], AUTO)
    found = {"auto": auto}
    found |= {f"{name}, same damping": bench.scores(rungs[name], AUTO) for name in ("ggn", "hessian")}
    found |= subspace_scores(bench)
    total = auto
    for seed in range(1, SEEDS):
        total = total + seed_scores(bench, seed)
        found[f"auto, {seed + 1} seeds"] = total / (seed + 1)
    return [Variant(name, interval(s, truth), paired(s, auto, truth)) for name, s in found.items()]


def seed_scores(bench: Bench, seed: int) -> Tensor:
    """Scores ``(Q, N)`` of untuned ``auto`` on a model trained with another seed; cached."""
    path = bench.folder / f"seed-{seed}.safetensors"
    if not path.exists() or bench.fresh:
        task = bench.entry.task
        module, record = recorded(task, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attributions = InfluenceModule(module, state=InfluenceState(record=record)).scores(
                task.pass_loader(), task.pass_loader(task.queries)
            )
        save_model({"scores": attributions.scores}, path)
    return load_file(path)["scores"].double()


def subspace_scores(bench: Bench) -> dict[str, Tensor]:
    """Scores in the Krylov subspace of all queries, from ``auto``'s factors and damping; cached."""
    path = bench.folder / f"subspace-{STEPS}.safetensors"
    if not path.exists() or bench.fresh:
        save_model({name: value.float().contiguous() for name, value in _solve(bench).items()}, path)
    return {name: value.double() for name, value in load_file(path).items()}


def _solve(bench: Bench) -> dict[str, Tensor]:
    source, task = bench.source, bench.entry.task
    damping = bench.damping_of(next(rung for rung in rungs_of(bench.entry) if rung.name == "auto"))
    factors = InfluenceModule(source.module).fit_factors(task.pass_loader())
    inverse = invert_blocks(
        source.layout, factors, dict.fromkeys(source.plan.layers, damping), take_eigenvalues
    )
    train, queries = (source.gradients(table).float() for table in (task.train, task.queries))
    ggn, hessian = GaussNewtonOperator(source), HessianOperator(source)
    space = Subspace(queries)
    krylov = block_krylov(
        lambda v: ggn.product(v) + damping * v, inverse.apply, space, max_steps=STEPS, tolerance=1e-3
    )
    basis = space.basis.double()
    small = basis @ hessian.product(space.basis).double().T
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    rotated = vectors.T @ basis  # (m, P)
    result = {"block Krylov, ggn": krylov.solutions.double() @ train.double().T}
    for name, kept in (("|hessian|", values.abs()), ("clipped hessian", values.clamp(min=0))):
        solved = ((queries.double() @ rotated.T) / (kept + damping)) @ rotated
        result[f"{name} in the subspace"] = solved @ train.double().T
    return {name: value / len(task.train) for name, value in result.items()}
