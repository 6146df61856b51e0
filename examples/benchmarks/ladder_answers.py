"""Scores of every rung and solver through the public call, kept on disk with the facts of their answer."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ladder_matrices import OPERATORS, Rotated, Source, rotated
from ladder_tasks import LadderTask
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_influence import InfluenceModule
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.support.errors import InfluenceError

Damping = float | str
GRID = tuple(10 ** (power / 2) for power in range(-8, 1))
COARSE = (1e-3, 1e-2, 1e-1)
AUTO = "auto"


@dataclass(frozen=True)
class Rung:
    """One way to answer.

    Attributes:
        name: shown in tables.
        method: of the public call; for a dense task, the matrix of this name is decomposed once instead.
        options: of the public call.
        grid: dampings besides ``"auto"``.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    grid: tuple[float, ...] = GRID


_EXACT = {"fisher": "exact"}
LADDER_RUNGS = (
    Rung("identity", "identity", grid=()),
    Rung("diagonal", "diagonal", _EXACT),
    Rung("kfac", "kfac", _EXACT),
    Rung("kfac, mixed", "kfac"),
    Rung("ekfac", "ekfac", _EXACT),
    Rung("ekfac, mixed", "ekfac"),
    Rung("block_ggn", "block_ggn"),
    Rung("ggn", "exact"),
    Rung("hessian", "hessian"),
)
SOLVERS = (
    Rung("auto", "auto", grid=COARSE),
    Rung("cg", "cg", grid=COARSE),
    # Every product with the Hessian is a pass: minutes an answer.
    Rung("cg, hessian", "cg", {"curvature": "hessian"}, grid=COARSE[2:]),
    Rung("minres, hessian", "minres", {"curvature": "hessian"}, grid=COARSE[2:]),
    Rung("lissa", "lissa", grid=COARSE[1:]),
    Rung("astra", "astra", grid=COARSE[1:]),
)
# A model without a dense matrix: block Krylov to a residual of .02 stands for its Gauss-Newton matrix.
LARGE = (
    *LADDER_RUNGS[:6],
    Rung("ggn", "auto", {"tolerance": 0.02, "max_steps": 12}, grid=(1e-3, 1e-2)),
    Rung("auto", "auto", grid=(1e-3, 1e-2)),
)


def rungs_of(entry: LadderTask, measurement: str = "loss") -> tuple[Rung, ...]:
    """Rungs and solvers that are run on a task.

    Args:
        entry: the task.
        measurement: for another one than the loss, which only changes the right-hand side, ``"auto"`` stands
            for the solvers.

    Returns:
        The rungs.
    """
    if not entry.dense:
        return LARGE
    return (*LADDER_RUNGS, *(SOLVERS if measurement == "loss" else SOLVERS[:1]))


@dataclass(frozen=True)
class Answer:
    """Scores ``(Q, N)``, None if the method refused; and the facts of its certificate."""

    scores: Tensor | None
    facts: dict[str, Any]


class Bench:
    """A trained task and its answers.

    Args:
        entry: the task.
        folder: where answers are kept.
        fresh: compute answers again although they are there: after a change of the package.
    """

    def __init__(self, entry: LadderTask, folder: Path, *, fresh: bool = False) -> None:
        self.entry, self.fresh = entry, fresh
        self.folder = folder / entry.task.model_path(0).stem
        self._states: dict[str, InfluenceState] = {}
        self._rotated: dict[str, Rotated] = {}
        self._done: set[Path] = set()

    @cached_property
    def source(self) -> Source:
        """Model, layers and data."""
        return Source(self.entry.task)

    def answer(self, rung: Rung, damping: Damping, measurement: str = "loss") -> Answer:
        """Scores of a rung, computed or from disk.

        Args:
            rung: what answers.
            damping: a number or ``"auto"``.
            measurement: of the queries.

        Returns:
            The answer.
        """
        words = json.dumps([rung.method, rung.options, damping, measurement], sort_keys=True)
        path = self.folder / f"{hashlib.sha256(words.encode()).hexdigest()[:20]}.safetensors"
        if not path.exists() or (self.fresh and path not in self._done):
            _keep(self._compute(rung, damping, measurement), path)
            self._done.add(path)
        return _load(path)

    def scores(self, rung: Rung, damping: Damping | None, measurement: str = "loss") -> Tensor:
        """Scores ``(Q, N)`` of a rung at a damping that it did not refuse.

        Raises:
            ValueError: if it refused, or there is no damping that it accepted.
        """
        if damping is None:
            raise ValueError(f"{rung.name} refused every damping of its grid.")
        found = self.answer(rung, damping, measurement)
        if found.scores is None:
            raise ValueError(f"{rung.name} refused damping {damping}: {found.facts['error']}")
        return found.scores

    def damping_of(self, rung: Rung) -> float:
        """Mean of the damping that ``"auto"`` chose for a rung."""
        return float(self.answer(rung, AUTO).facts["damping"])

    def _compute(self, rung: Rung, damping: Damping, measurement: str) -> Answer:
        name = {"exact": "ggn"}.get(rung.method, rung.method)
        # One call a rung goes the public way, which also tells its cost; the rest of the grid is cheaper so.
        if name in OPERATORS and (damping != AUTO or measurement != "loss"):
            if name not in self._rotated:
                self._rotated[name] = rotated(self.source, name, self.entry.measurements)
            value = self._spread(rung) if damping == AUTO else float(damping)
            facts = {"damping": float(torch.as_tensor(value).mean())}
            return Answer(self._rotated[name].scores(value, measurement), facts)
        key = str(rung.options.get("fisher"))
        state = self._states.get(key)
        whole = state is None or (damping == AUTO and measurement == "loss")
        if whole:
            state = InfluenceState(record=self.source.record)
        assert state is not None
        # The coarse space is made for the first damping asked for: every damping gets its own.
        state = replace(state, coarse=None, coarse_key="")
        module, task = InfluenceModule(self.source.module, state=state), self.entry.task
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = module.scores(
                    task.pass_loader(),
                    task.pass_loader(task.queries),
                    method=rung.method,
                    damping=damping,
                    measurement=measurement,
                    max_parameters=16384,
                    **rung.options,
                )
        except InfluenceError as error:
            return Answer(None, {"error": str(error)})
        if module.state.factors is not None:
            self._states[key] = module.state
        facts = _facts(found.diagnostics, len(task.train)) | {
            "cpu_seconds": time.process_time() - start,
            "whole": whole,
        }
        return Answer(found.scores, facts)

    def _spread(self, rung: Rung) -> Tensor:
        """Return what ``"auto"`` was for a dense rung, for each eigenvalue ``(P,)``."""
        layers = self.answer(rung, AUTO).facts["damping_layers"]
        if rung.method != "block_ggn" and len(set(layers.values())) > 1:
            raise NotImplementedError("The dense rungs of the study take one damping for all layers.")
        return self.source.layout.expand(layers, torch.zeros((), dtype=torch.float64))


def _facts(diagnostics: Any, num_train: int) -> dict[str, Any]:
    """Return what the report needs of a certificate, as JSON values."""
    damping, passes = list(diagnostics.damping.values()), diagnostics.passes
    residuals, extra = diagnostics.residuals, diagnostics.extra
    chosen = (
        "solver",
        "lissa",
        "astra",
        "krylov_steps",
        "krylov_queries",
        "coarse_space",
        "negative_curvature",
    )
    return {
        "damping": sum(damping) / len(damping) if damping else 0.0,
        "damping_layers": dict(diagnostics.damping),
        "origin": diagnostics.damping_origin,
        "epochs": sum(one["examples"] for one in passes) / num_train,
        "passes": len(passes),
        "seconds": diagnostics.seconds,
        "residual_mean": None if residuals is None else float(residuals.mean()),
        "residual_max": None if residuals is None else float(residuals.max()),
        "warnings": list(diagnostics.warnings),
        **{name: extra[name] for name in chosen if name in extra},
    }


def _keep(answer: Answer, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {} if answer.scores is None else {"scores": answer.scores.float().contiguous()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"facts": json.dumps(answer.facts, default=str)})
    partial.replace(path)


def _load(path: Path) -> Answer:
    with safe_open(path, "pt") as stored:
        facts = json.loads(stored.metadata()["facts"])
        return Answer(stored.get_tensor("scores").double() if "scores" in stored.keys() else None, facts)  # noqa: SIM118
