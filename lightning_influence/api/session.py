"""One call on a borrowed Trainer: the state it starts from and leaves, at one checkpoint or several."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import Self

from lightning_influence.api.checks import check_trainer, find_callback
from lightning_influence.api.engine import Engine, Question
from lightning_influence.collecting.state import read_saved_state
from lightning_influence.curvature.factors import Factors
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.results.attributions import Attributions
from lightning_influence.results.averages import average_attributions
from lightning_influence.running.host.attributes import TRANSFER_HOOKS, defines
from lightning_influence.running.host.checkpoints import remember_weights
from lightning_influence.running.host.module import unwrap_compiled
from lightning_influence.running.host.packages import is_lightning
from lightning_influence.running.host.trainer import find_last_fit
from lightning_influence.running.trainer_runner import TrainerRunner
from lightning_influence.support.notes import warn


class Session:
    """One call: the borrowed Trainer, and the state that the call starts from and leaves.

    In its ``with`` block the Trainer and the module are borrowed, and a checkpoint has been loaded.

    Args:
        trainer: the Trainer.
        model: the module; by default the one the Trainer ran last.
        datamodule: where loaders come from that are not given.
        ckpt_path: ``"best"``, ``"last"`` or a path: weights, and a callback's state, to load first.
        factors: factors to use for this call only, ``"refit"`` to fit them anew, or None for those on record.

    Attributes:
        runner: runs passes on the borrowed Trainer.

    Raises:
        TypeError: if an argument is of a wrong type.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: LightningModule | None,
        datamodule: LightningDataModule | None,
        ckpt_path: str | None,
        factors: Factors | Literal["refit"] | None,
    ) -> None:
        check_trainer(trainer)
        _check_datamodule(datamodule)
        _check_factors(factors)
        self._own = find_callback(trainer)
        self._reader = _CheckpointReader()
        self._factors = factors
        self._state = InfluenceState()
        self._begun: list[object] = []
        restore: list[Callback] = [self._reader] if self._own is None else [self._own, self._reader]
        # Asked now: loading a checkpoint lets go of the loader for the time being.
        self._fitted, last_datamodule = find_last_fit(trainer)
        applies = datamodule is None and (model is None or trainer.lightning_module is model)
        self._last_datamodule = last_datamodule if applies else None
        self.runner = TrainerRunner(
            trainer,
            model,
            datamodule=datamodule,
            hooks_of=self._last_datamodule,
            ckpt_path=ckpt_path,
            restore=restore,
        )

    def __enter__(self) -> Self:
        """Borrow the Trainer, load the checkpoint if there is one, and find the state to start from.

        Returns:
            The session itself.
        """
        self.runner.__enter__()
        self._state = self._find_state()
        if self._factors == "refit":
            self._state = InfluenceState(record=self._state.record)
        elif isinstance(self._factors, Factors):
            self._state = replace(self._state, factors=self._factors, factors_key="", collected=False)
        self._begun = self._find_results()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Give everything back; of a call that failed or was interrupted, what it has finished is kept."""
        if error is not None and self.runner.world_size == 1 and self._state.factors is not None:
            pairs = zip(self._begun, self._find_results(), strict=True)
            if any(before is not now for before, now in pairs):
                self.keep()
        self.runner.__exit__(kind, error, trace)

    def _find_results(self) -> list[object]:
        """Return what passes compute for later calls; each is there when it is complete only."""
        return [self._state.factors, self._state.coarse, self._state.compact]

    def _find_state(self) -> InfluenceState:
        """Find the state of this Trainer's callback, or of any callback in the checkpoint."""
        if self._own is not None and (self._reader.state is None or self._own in self.runner.restored):
            return self._own.influence_state
        return self._reader.state or InfluenceState()

    @property
    def record(self) -> TrainingRecord | None:
        """The training run on record."""
        return self._state.record

    def find_train_loader(self, given: Any) -> Any:
        """Return the loader that was given, or those of the datamodule, the last fit, or the module."""
        if given is not None:
            self._tell_of_hooks()
            return given
        if self._fitted is None or self.runner.datamodule is not None:
            return self.runner.train_dataloaders()
        return self._fitted

    def _tell_of_hooks(self) -> None:
        """Say so if loaders that were passed go through the hooks of a datamodule that was not."""
        last = self._last_datamodule
        hooks = [hook for hook in TRANSFER_HOOKS if last is not None and defines(last, hook)]
        if hooks:
            warn(
                f"The loaders that were passed go through {', '.join(hooks)} of {type(last).__name__}, the "
                "datamodule of the last fit. Pass datamodule= to say that this is meant; ask about loaders "
                "that need no hooks with a Trainer that was not fitted with it.",
                stacklevel=3,
            )

    def find_query_loaders(self, given: Any) -> Any:
        """Return the loaders that were given, or those of the datamodule or the module."""
        return self.runner.query_dataloaders() if given is None else given

    def ask(self, question: Question) -> Engine:
        """Return what answers a question, starting from the state that was found."""
        return Engine(self.runner, self._state, question, checkpoint=self.runner.ckpt_path)

    def keep(self) -> None:
        """Let the callback keep what later queries can use; given factors serve this call only."""
        if self._own is None:
            return
        if isinstance(self._factors, Factors):
            known = self._find_state()
            self._state = replace(
                self._state,
                factors=known.factors,
                factors_key=known.factors_key,
                collected=known.collected,
            )
        self._own.influence_state = self._state


class _CheckpointReader(Callback):
    """Finds the state of any influence callback in a checkpoint, for a Trainer that has none of the kind."""

    state: InfluenceState | None = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the state."""
        self.state = read_saved_state(checkpoint)


def average_over_checkpoints(
    trainer: Trainer,
    model: LightningModule | None,
    paths: Sequence[str],
    answer: Callable[[str], Attributions],
) -> Attributions:
    """Average the answers at several checkpoints; the model keeps the weights it has, the callback its state.

    Args:
        trainer: the Trainer.
        model: the module; by default the one the Trainer ran last.
        paths: what :func:`~lightning_influence.api.trainer.influence` takes as one ``ckpt_path``.
        answer: the answer at one of them.

    Returns:
        The average.

    Raises:
        ValueError: if there is no path, or no module to load them into.
    """
    check_trainer(trainer)
    module = trainer.lightning_module if model is None else model
    if not paths or module is None:
        what = "no module" if paths else "an empty ckpt_path"
        raise ValueError(f"Got {what}; pass at least one checkpoint, and the module to load it into.")
    own = find_callback(trainer)
    state = None if own is None else own.influence_state
    put_back = remember_weights(unwrap_compiled(module))
    try:
        return average_attributions([answer(path) for path in paths])
    finally:
        put_back()
        if own is not None and state is not None:
            own.influence_state = state


def read_paths(ckpt_path: Any) -> str | list[str] | None:
    """Read one checkpoint or several, None for the weights in memory.

    Returns:
        Their paths as texts, or ``"best"`` and ``"last"``.

    Raises:
        TypeError: if it is something else.
    """
    if ckpt_path is None:
        return None
    if isinstance(ckpt_path, str | os.PathLike):
        return os.fspath(ckpt_path)
    several = isinstance(ckpt_path, Iterable) and not isinstance(ckpt_path, bytes | bytearray)
    paths = list(ckpt_path) if several else [ckpt_path]
    if not several or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise TypeError(
            f"Got ckpt_path={ckpt_path!r}; accepted are 'best', 'last', a path, a list of them, or None for "
            "the weights that the model has now."
        )
    return [os.fspath(path) for path in paths]


def _check_datamodule(datamodule: object) -> None:
    """Refuse what is no datamodule.

    Raises:
        TypeError: saying what to pass.
    """
    if datamodule is not None and not is_lightning(datamodule, "LightningDataModule"):
        raise TypeError(
            f"Got datamodule of type {type(datamodule).__name__}; accepted is a LightningDataModule, "
            "or None. Loaders go to train_dataloaders and query_dataloaders."
        )


def _check_factors(factors: object) -> None:
    """Refuse factors that are none.

    Raises:
        TypeError: saying what is accepted.
    """
    if isinstance(factors, str) and factors != "refit":
        raise TypeError(f"Got factors={factors!r}; accepted are Factors, 'refit' or None.")
    if factors is not None and not isinstance(factors, Factors | str):
        raise TypeError(
            f"Got factors of type {type(factors).__name__}; accepted are Factors, 'refit' or None."
        )
