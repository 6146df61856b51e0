"""The upper rungs of the ladder as dense matrices: one eigendecomposition gives the scores at any damping."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from decomposition import diagonal_blocks
from safetensors.torch import load_file
from spectra import recorded
from tasks import Task, TensorTable, save_model
from torch import Tensor

from lightning_influence import InfluenceModule
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.operators import GaussNewtonOperator, HessianOperator
from lightning_influence.methods.closed_form import invert_blocks, multiply_eigenvalues, take_eigenvalues
from lightning_influence.methods.gathering import GradientPass
from lightning_influence.model.layers.plan import Layout, find_layers
from lightning_influence.model.measurements import resolve_measurement
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.running.reading import prepare_train

OPERATORS = {"hessian": HessianOperator, "ggn": GaussNewtonOperator, "block_ggn": GaussNewtonOperator}
FACTORED = {"ekfac": take_eigenvalues, "kfac": multiply_eigenvalues}


class Source:
    """A task's trained model with its layers, data and runner: what operators are made from.

    Args:
        task: the task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.module, self.record = recorded(task)
        self.runner = LoopRunner(self.module)
        self.plan = find_layers(self.module)
        self.train = prepare_train(task.pass_loader())
        self.layout = Layout.of(self.plan.layers)

    def gradients(self, table: TensorTable, measurement: str = "loss") -> Tensor:
        """Return gradients ``(N, P)`` of a measurement on every example of a table, in float64."""
        measure = None if measurement == "loss" else resolve_measurement(measurement, self.module)
        one_pass = GradientPass(self.plan, measure)
        self.runner.run(one_pass, self.task.pass_loader(table))
        return self.layout.dense(one_pass.gradients)[0].double()

    def matrix(self, name: str) -> Tensor:
        """Return a rung as a matrix ``(P, P)`` in float64; the factored ones are of exact columns."""
        if name in OPERATORS:
            matrix = OPERATORS[name](self).dense()
            if name == "block_ggn":
                return torch.block_diag(*diagonal_blocks(matrix, self.layout).values())
            return matrix
        factors = InfluenceModule(self.module).fit_factors(self.task.pass_loader(), fisher="exact")
        if name == "diagonal":
            return torch.diag(torch.diagonal(OPERATORS["ggn"](self).dense()))
        undamped = dict.fromkeys(self.plan.layers, 0.0)
        inverse = invert_blocks(self.layout, factors, undamped, FACTORED[name])
        double = {name: layer.to(dtype=torch.float64) for name, layer in inverse.layers.items()}
        matrix = BlockInverse(self.layout, double).multiply(torch.eye(self.layout.numel).double())
        return (matrix + matrix.T) / 2


@dataclass(frozen=True)
class Rotated:
    """Eigenvalues of a rung and gradients in its eigenbasis.

    Attributes:
        values: ``(P,)``.
        train: gradients of the training losses, ``(N, P)``.
        queries: gradients of each measurement, ``(Q, P)``.
    """

    values: Tensor
    train: Tensor
    queries: dict[str, Tensor]

    def scores(self, damping: float | Tensor, measurement: str = "loss") -> Tensor:
        """Scores ``(Q, N)`` of ``(|H| + damping)^{-1}``, positive where an example raises the measurement.

        Args:
            damping: a number, or one for each eigenvalue ``(P,)``.
            measurement: of the queries.

        Returns:
            Predicted changes for removing an example; a negative curvature counts by its magnitude.
        """
        solved = self.queries[measurement] / (self.values.abs() + damping)
        return (solved @ self.train.T) / len(self.train)


def rotated(source: Source, name: str, measurements: tuple[str, ...]) -> Rotated:
    """Decompose a rung, or load what was decomposed before; it is kept beside the trained model.

    Args:
        source: model and data.
        name: of ``OPERATORS``.
        measurements: of the queries.

    Returns:
        Eigenvalues and gradients in the eigenbasis. Those of ``block_ggn`` are sorted by layers.
    """
    task = source.task
    path: Path = task.model_path(0).with_suffix(f".{name}")
    stored = load_file(path) if path.exists() else {}
    if not {f"queries.{measurement}" for measurement in measurements} <= set(stored):
        matrix = source.matrix(name)
        blocks = [matrix]
        if name == "block_ggn":
            blocks = list(diagonal_blocks(matrix, source.layout).values())
        pairs = [torch.linalg.eigh(block) for block in blocks]
        vectors = torch.block_diag(*(pair[1] for pair in pairs))
        tables = {"train": source.gradients(task.train)}
        tables |= {f"queries.{m}": source.gradients(task.queries, m) for m in measurements}
        small = {key: (value @ vectors).float().contiguous() for key, value in tables.items()}
        stored = {"values": torch.cat([pair[0] for pair in pairs]), **small}
        save_model(stored, path)
    queries = {m: stored[f"queries.{m}"].double() for m in measurements}
    return Rotated(stored["values"], stored["train"].double(), queries)
