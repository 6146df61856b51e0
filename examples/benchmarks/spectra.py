"""Exact Gauss-Newton scores of a small trained task at any damping, from one eigendecomposition."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from tasks import Task, TaskModule, TensorTable, fit, save_model
from torch import Tensor

from lightning_influence import InfluenceCallback
from lightning_influence.curvature.gauss_newton import DenseCurvaturePass
from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.methods.gathering import GradientPass
from lightning_influence.model.layers.plan import Layout, find_layers
from lightning_influence.running.loop_runner import LoopRunner


def recorded(task: Task, seed: int = 0) -> tuple[TaskModule, TrainingRecord]:
    """The trained model and what :class:`InfluenceCallback` recorded of its training; cached together.

    Args:
        task: what is trained.
        seed: of the initial values and the order of the batches.

    Returns:
        The module in eval mode, and the record.
    """
    path = task.model_path(seed)
    note = path.with_suffix(".record.json")
    if not (path.exists() and note.exists()):
        callback = InfluenceCallback()
        save_model(fit(task, seed, [callback]).state_dict(), path)
        assert callback.record is not None
        partial = note.with_suffix(".partial")
        partial.write_text(json.dumps(callback.record.state_dict()), encoding="utf-8")
        partial.replace(note)
    return task.trained(seed), TrainingRecord.from_state_dict(json.loads(note.read_text("utf-8")))


@dataclass(frozen=True)
class Spectrum:
    """A trained model's curvature ``V diag(e) V^T`` and its gradients in that basis.

    Attributes:
        values: ``e``, ``(P,)``, ascending.
        train: gradients of the training examples, ``(N, P)``.
        queries: gradients of the queries' losses, ``(Q, P)``.
        path: the file that also holds the vectors, which only anisotropic damping needs.
    """

    values: Tensor
    train: Tensor
    queries: Tensor
    path: Path

    @cached_property
    def vectors(self) -> Tensor:
        """``V``, ``(P, P)``, one eigenvector a column."""
        return load_file(self.path)["vectors"].double()

    def scores(self, damping: float | Tensor) -> Tensor:
        """Scores ``(Q, N)`` of ``(G + damping)^{-1}``; positive where an example helps.

        Args:
            damping: one number, or one for each parameter, ``(P,)``.

        Returns:
            Changes of the queries' losses predicted for removing an example.
        """
        if isinstance(damping, float):
            solved = self.queries / (self.values + damping)
        else:
            matrix = torch.diag(self.values) + self.vectors.T @ (damping[:, None].double() * self.vectors)
            solved = torch.linalg.solve(matrix, self.queries.T).T
        return solved @ self.train.T / len(self.train)


def _gradients(module: TaskModule, task: Task, table: TensorTable) -> Tensor:
    plan = find_layers(module)
    one_pass = GradientPass(plan, dtype=torch.float64)
    LoopRunner(module).run(one_pass, task.pass_loader(table))
    return Layout.of(plan.layers).dense(one_pass.gradients)[0]


def spectrum(task: Task, seed: int = 0) -> Spectrum:
    """Eigenvalues of the dense Gauss-Newton matrix and the rotated gradients, cached beside the model.

    Args:
        task: the task, of a few thousand parameters.
        seed: of the trained model.

    Returns:
        The spectrum, in float64.
    """
    path = task.model_path(seed).with_suffix(".spectrum")
    if not path.exists():
        module, _ = recorded(task, seed)
        plan = find_layers(module)
        curvature = DenseCurvaturePass(plan)
        LoopRunner(module).run(curvature, task.pass_loader())
        values, vectors = torch.linalg.eigh(curvature.result())
        tables = {"train": task.train, "queries": task.queries}
        rotated = {name: _gradients(module, task, table) @ vectors for name, table in tables.items()}
        small = {name: value.float().contiguous() for name, value in {**rotated, "vectors": vectors}.items()}
        save_model({"values": values.clamp(min=0), **small}, path)
    stored = load_file(path)
    return Spectrum(stored["values"], stored["train"].double(), stored["queries"].double(), path)
