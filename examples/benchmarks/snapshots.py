"""Checkpoints along one run of a task, each with what the callback had recorded of the run by then."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
from ladder_matrices import Source
from safetensors.torch import load_file
from tasks import Task, TaskModule, fit, save_model
from torch import Tensor

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.methods.closed_form import invert_blocks, take_eigenvalues
from lightning_influence.model.layers.plan import Layout, find_layers
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.running.reading import prepare_train


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint of a run.

    Attributes:
        epoch: epochs that were over.
        module: the model, in eval mode.
        record: of the steps up to here.
    """

    epoch: int
    module: TaskModule
    record: TrainingRecord


class _Keep(lightning.Callback):
    """Writes the model and the record at the end of some epochs."""

    def __init__(self, paths: dict[int, Path], influence: InfluenceCallback) -> None:
        self.paths, self.influence = paths, influence

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        path = self.paths.get(trainer.current_epoch + 1)
        if path is None:
            return
        assert self.influence.record is not None
        save_model({name: value.clone() for name, value in pl_module.state_dict().items()}, path)
        _write(self.influence.record.state_dict(), path.with_suffix(".record.json"))


def snapshots(task: Task, epochs: Sequence[int], seed: int = 0) -> list[Snapshot]:
    """Checkpoints of one run, cached beside its final model; missing ones take one training run together.

    Args:
        task: what is trained.
        epochs: after how many epochs, in order; the last may be the recipe's.
        seed: of the run.

    Returns:
        One snapshot for each of ``epochs``.

    Raises:
        ValueError: if an epoch is not one of the run's.
    """
    last = task.recipe.epochs
    if not all(1 <= epoch <= last for epoch in epochs):
        raise ValueError(f"Got epochs {list(epochs)} of a run of {last}; accepted are 1 to {last}.")
    stem = task.model_path(seed)
    paths = {epoch: stem.with_suffix(f".epoch-{epoch}.safetensors") for epoch in epochs}
    missing = {epoch: path for epoch, path in paths.items() if not _note(path).exists()}
    if missing:
        influence = InfluenceCallback()
        fit(task, seed, [influence, _Keep(missing, influence)])
    return [_load(task, epoch, path) for epoch, path in paths.items()]


def _load(task: Task, epoch: int, path: Path) -> Snapshot:
    module = task.untrained()
    module.load_state_dict(load_file(path))
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    record = TrainingRecord.from_state_dict(json.loads(_note(path).read_text("utf-8")))
    return Snapshot(epoch, module.eval(), record)


def _note(path: Path) -> Path:
    return path.with_suffix(".record.json")


def _write(record: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(path)


class Checkpoint(Source):
    """A checkpoint as what operators are made from.

    Args:
        task: what was trained.
        snapshot: the checkpoint.
    """

    def __init__(self, task: Task, snapshot: Snapshot) -> None:
        self.task, self.module, self.record = task, snapshot.module, snapshot.record
        self.runner, self.plan = LoopRunner(self.module), find_layers(self.module)
        self.train = prepare_train(self.task.pass_loader())
        self.layout = Layout.of(self.plan.layers)

    def ask(self, method: str, **options: str) -> Tensor:
        """Return the public call's scores ``(Q, N)``, nothing tuned."""
        module = InfluenceModule(self.module, state=InfluenceState(record=self.record))
        loaders = self.task.pass_loader(), self.task.pass_loader(self.task.queries)
        scores = module.scores(*loaders, method=method, **options).scores
        assert scores is not None
        return scores.double()

    @cached_property
    def time(self) -> float:
        """Sum of effective learning rates up to here; SGD has one for all layers."""
        return next(iter(self.record.layers.values())).rate

    @cached_property
    def gradients_of_train(self) -> Tensor:
        """Gradients of the training losses, ``(N, P)``."""
        return self.gradients(self.task.train)

    @cached_property
    def ekfac(self) -> BlockInverse:
        """EK-FAC of exact columns."""
        factors = InfluenceModule(self.module).fit_factors(self.task.pass_loader(), fisher="exact")
        damping = self.task.recipe.damping(len(self.task.train))
        named = dict.fromkeys(self.plan.layers, damping)
        return invert_blocks(self.layout, factors, named, take_eigenvalues)
