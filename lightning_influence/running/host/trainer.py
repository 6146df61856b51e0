"""The Trainer: whether it can serve passes, and lending it to them."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn, TrainerState

from lightning_influence.running.host.attributes import preserved
from lightning_influence.running.host.checkpoints import ExplainingCheckpointIO
from lightning_influence.support.errors import UnsupportedTrainerError

LOGGER_CONNECTOR = (
    "_progress_bar_metrics",
    "_logged_metrics",
    "_callback_metrics",
    "_first_loop_iter",
    "_current_fx",
)
CHECKPOINT_CONNECTOR = ("_ckpt_path", "_user_managed", "_loaded_checkpoint")
STRATEGY = ("_lightning_module", "_model", "_lightning_optimizers", "_checkpoint_io")
SIGNAL_CONNECTOR = ("received_sigterm", "_original_handlers")
RUN = ("callbacks", "_loggers", "profiler", "datamodule", "predict_loop", "limit_predict_batches", "state")


_METHODS: dict[str, Callable[..., Any]] = {}


def register_trainer_method(function: Callable[..., Any]) -> None:
    """Let :func:`attach_methods` give Trainers a function as a method; its first argument is the Trainer."""
    _METHODS[function.__name__] = function


def attach_methods(trainer: Trainer) -> None:
    """Give a plain Trainer the registered methods, in a form that survives pickling."""
    for name, function in _METHODS.items():
        if not hasattr(trainer, name):
            setattr(trainer, name, functools.partial(function, trainer))


def check_trainer(trainer: Trainer) -> None:
    """Refuse a Trainer under which passes would fail or be wrong.

    Raises:
        UnsupportedTrainerError: for strategies that start processes with spawn or fork, strategies that shard
            parameters, a Trainer in the middle of a run, and a call inside ``torch.inference_mode``.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise UnsupportedTrainerError(
            f"{name} starts its processes with spawn or fork, and what they compute is lost when they end. "
            'Use Trainer(strategy="ddp") in a script, or Trainer(devices=1) in a notebook.'
        )
    if splits_parameters(trainer):
        raise UnsupportedTrainerError(
            f"{name} splits the parameters over processes; influence needs whole layers. "
            'Use Trainer(devices=1) or Trainer(strategy="ddp") with the consolidated checkpoint.'
        )
    loop = trainer._active_loop
    if loop is not None and loop._data_fetcher is not None:
        raise UnsupportedTrainerError(
            f"The Trainer is in the middle of {trainer.state.fn.value if trainer.state.fn else 'a run'}(). "
            "Ask for influence once that has ended: from the callback hook on_fit_end on."
        )
    if torch.is_inference_mode_enabled():
        raise UnsupportedTrainerError(
            "Gradients cannot be taken inside torch.inference_mode(). Leave that block (no_grad() is fine)."
        )


def splits_parameters(trainer: Trainer) -> bool:
    """Return whether the Trainer's strategy gives no process whole layers."""
    return isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)


def resolve_checkpoint(trainer: Trainer, ckpt_path: str) -> str:
    """Turn ``"best"``, ``"last"``, ``"hpc"`` or a path into a path, as ``Trainer.predict`` would.

    Args:
        trainer: the Trainer whose checkpoint callbacks are asked.
        ckpt_path: one of the keywords, or a path.

    Returns:
        The path of a checkpoint file.

    Raises:
        ValueError: if the keyword names no checkpoint.
    """
    connected = trainer.lightning_module is not None
    path = trainer._checkpoint_connector._parse_ckpt_path(
        TrainerFn.PREDICTING, ckpt_path, model_provided=True, model_connected=connected
    )
    if not path:
        raise ValueError(
            f"ckpt_path={ckpt_path!r} names no checkpoint of this Trainer. Pass a path, or None for the "
            "weights that the model has now."
        )
    return str(path)


@contextlib.contextmanager
def borrowed_trainer(trainer: Trainer, callbacks: list[Callback]) -> Iterator[None]:
    """Lend the Trainer to passes: its callbacks, loggers, profiler, loop and state step aside and come back.

    Inside, ``trainer.predict`` runs the given callbacks only, with gradients allowed, over whole loaders, and
    writes nothing to the user's loggers. A fresh predict loop and state take the place of the Trainer's, so
    that those are not written to at all.
    """
    host: Any = trainer  # several public attributes of Trainer are declared nowhere
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved(trainer, *RUN))
        stack.enter_context(preserved(trainer.strategy, *STRATEGY))
        stack.enter_context(preserved(trainer._data_connector, "_datahook_selector"))
        stack.enter_context(preserved(trainer._logger_connector, *LOGGER_CONNECTOR))
        stack.enter_context(preserved(trainer._checkpoint_connector, *CHECKPOINT_CONNECTOR))
        stack.enter_context(preserved(trainer._signal_connector, *SIGNAL_CONNECTOR))
        stack.enter_context(preserved(trainer._callback_connector, "_pending_litmodels_tip"))
        stack.enter_context(_preserved_interrupt())
        for loop in loops:
            stack.enter_context(preserved(loop, "_combined_loader"))
            stack.enter_context(preserved(loop._data_source, "instance"))
        _stop_display(host.callbacks)
        host.callbacks = callbacks
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        host.profiler = PassThroughProfiler()
        host.datamodule = None
        trainer.limit_predict_batches = 1.0
        trainer.predict_loop = type(trainer.predict_loop)(trainer, inference_mode=False)
        trainer.state = TrainerState()
        trainer.strategy.checkpoint_io = ExplainingCheckpointIO(trainer.strategy.checkpoint_io)
        trainer._checkpoint_connector._ckpt_path = None
        trainer._checkpoint_connector._user_managed = False
        trainer._callback_connector._pending_litmodels_tip = False
        yield


def _stop_display(callbacks: list[Callback]) -> None:
    """Close the finished display of a fit, open until teardown: a second one would break its closing."""
    for callback in callbacks:
        if isinstance(callback, RichProgressBar) and callback.progress is not None:
            callback.progress.stop()


@contextlib.contextmanager
def _preserved_interrupt() -> Iterator[None]:
    """Lightning ignores SIGINT after the first one; a notebook needs the handler back."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) != handler:
            signal.signal(signal.SIGINT, handler)
