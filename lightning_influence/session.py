"""One call on a borrowed Trainer: the state it starts from and leaves, at one checkpoint or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_influence.attributions import Attributions
from lightning_influence.callback import InfluenceCallback
from lightning_influence.collecting.store import state_from_checkpoint
from lightning_influence.engine import Engine
from lightning_influence.ensembles import average_attributions
from lightning_influence.factors.factors import Factors
from lightning_influence.factors.training_record import TrainingRecord
from lightning_influence.question import Question
from lightning_influence.running.predict import TrainerRunner
from lightning_influence.state import InfluenceState


class Session:
    """One call: the borrowed Trainer, and the state that the call starts from and leaves."""

    def __init__(
        self,
        trainer: Trainer,
        model: LightningModule | None,
        datamodule: LightningDataModule | None,
        ckpt_path: str | None,
        factors: Factors | Literal["refit"] | None,
    ) -> None:
        host: Any = trainer  # its callbacks are declared nowhere
        self._own = next((c for c in host.callbacks if isinstance(c, InfluenceCallback)), None)
        self._reader = _CheckpointReader()
        self._factors = factors
        restore: list[Callback] = [self._reader] if self._own is None else [self._own, self._reader]
        self.runner = TrainerRunner(
            trainer, model, datamodule=datamodule, ckpt_path=ckpt_path, restore=restore
        )
        self._fitted = trainer.train_dataloader  # now: loading a checkpoint lets go of it for the time being

    def engine(self, question: Question) -> Engine:
        """Return the engine, with the state that is there once a checkpoint has been loaded.

        Raises:
            TypeError: if the factors are of a wrong type.
        """
        self._state = self._found()
        if self._factors == "refit":
            self._state = InfluenceState(record=self._state.record)
        elif isinstance(self._factors, Factors):
            self._state = replace(self._state, factors=self._factors, factors_key="")
        elif self._factors is not None:
            raise TypeError(
                f"Got factors of type {type(self._factors).__name__}; accepted are Factors, 'refit' or None."
            )
        return Engine(self.runner, self._state, question, checkpoint=self.runner.ckpt_path)

    def _found(self) -> InfluenceState:
        """Return the state of this Trainer's callback, or of any callback in the checkpoint."""
        if self._own is not None and (self._reader.state is None or self._own in self.runner.restored):
            return self._own.influence_state
        return self._reader.state or InfluenceState()

    @property
    def record(self) -> TrainingRecord | None:
        """The training run on record, once a checkpoint has been loaded."""
        return self._found().record

    def train_loader(self, given: Any) -> Any:
        """Return the loader that was given, or those of the datamodule, the last fit, or the module."""
        if given is not None:
            return given
        if self._fitted is None or self.runner.datamodule is not None:
            return self.runner.train_dataloaders()
        return self._fitted

    def keep(self) -> None:
        """Let the callback keep what later queries can use; given factors serve this call only."""
        if self._own is None:
            return
        if isinstance(self._factors, Factors):
            known = self._found()
            self._state = replace(self._state, factors=known.factors, factors_key=known.factors_key)
        self._own.influence_state = self._state


class _CheckpointReader(Callback):
    """Finds the state of any influence callback in a checkpoint, for a Trainer that has none of the kind."""

    state: InfluenceState | None = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the state."""
        self.state = state_from_checkpoint(checkpoint)


def over_checkpoints(
    trainer: Trainer,
    model: LightningModule | None,
    paths: Sequence[str],
    answer: Callable[[str], Attributions],
) -> Attributions:
    """Average the answers at several checkpoints; the model keeps the weights it has, the callback its state.

    Args:
        trainer: the Trainer.
        model: the module; by default the one the Trainer ran last.
        paths: what :func:`~lightning_influence.trainer.influence` takes as one ``ckpt_path``.
        answer: the answer at one of them.

    Returns:
        The average.

    Raises:
        ValueError: if there is no path, or no module to load them into.
    """
    host: Any = trainer
    module = trainer.lightning_module if model is None else model
    if not paths or module is None:
        what = "no module" if paths else "an empty ckpt_path"
        raise ValueError(f"Got {what}; pass at least one checkpoint, and the module to load it into.")
    own = next((c for c in host.callbacks if isinstance(c, InfluenceCallback)), None)
    state = None if own is None else own.influence_state
    with torch.no_grad():
        weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        return average_attributions([answer(path) for path in paths])
    finally:
        module.load_state_dict(weights)
        if own is not None and state is not None:
            own.influence_state = state
