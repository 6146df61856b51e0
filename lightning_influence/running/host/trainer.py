"""The Trainer: whether it can serve passes, and lending it to them."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_influence.running.host.attributes import preserved
from lightning_influence.running.host.checkpoints import ExplainingCheckpointIO
from lightning_influence.running.host.packages import is_lightning, load_beside
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
    if is_lightning(strategy.launcher, "_MultiProcessingLauncher"):
        raise UnsupportedTrainerError(
            f"{name} starts its processes with spawn or fork, and what they compute is lost when they end. "
            'Use Trainer(strategy="ddp") in a script, or Trainer(devices=1) in a notebook.'
        )
    check_strategy(trainer)
    # Asked of every loop: within a pass, the Trainer says that it trains and not that it predicts.
    loops: dict[str, Any] = {
        "fit": trainer.fit_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    running = [name for name, loop in loops.items() if loop._data_fetcher is not None]
    if running:
        raise UnsupportedTrainerError(
            f"The Trainer is in the middle of {running[0]}(). Ask for influence once that has ended: from "
            "the callback hook on_fit_end on."
        )
    if torch.is_inference_mode_enabled():
        raise UnsupportedTrainerError(
            "Gradients cannot be taken inside torch.inference_mode(). Leave that block (no_grad() is fine)."
        )


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that split parameters over processes in another way than ``fully_shard`` does.

    Raises:
        UnsupportedTrainerError: saying what is accepted.
    """
    strategy: Any = trainer.strategy
    name = type(strategy).__name__
    if is_lightning(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        raise UnsupportedTrainerError(
            f"{name} splits the parameters over processes in flat pieces; accepted are one device, "
            'strategy="ddp", and ModelParallelStrategy(data_parallel_size=<number of processes>, '
            "tensor_parallel_size=1) with torch's fully_shard in configure_model."
        )
    size = strategy._tensor_parallel_size if splits_parameters(trainer) else 1
    size = strategy.num_processes if size == "auto" else size
    if size != 1:
        raise UnsupportedTrainerError(
            f"{name} splits layers over tensor_parallel_size={size} processes (tensor parallel); accepted "
            f"are data-parallel shards alone: {name}(data_parallel_size=<number of processes>, "
            "tensor_parallel_size=1) with torch's fully_shard in configure_model."
        )


def splits_parameters(trainer: Trainer) -> bool:
    """Return whether the Trainer's strategy leaves the processes parts of the parameters, see ``shards``."""
    return is_lightning(trainer.strategy, "ModelParallelStrategy")


def find_log_folder(trainer: Trainer) -> str | None:
    """Find the folder of the Trainer's run; to be called on all processes.

    Args:
        trainer: the Trainer.

    Returns:
        The folder of its first logger for this run. For a logger that has none, such as Weights & Biases, the
        one in which Lightning keeps the run's checkpoints, which is in ``default_root_dir`` if the logger
        writes to a service or a data base. None without a logger, and on all processes but that of rank zero.
    """
    if not trainer.loggers:
        return None
    folder = trainer.log_dir  # speaks to the other processes
    if not trainer.is_global_zero or is_lightning(trainer.loggers[0], "DummyLogger"):
        return None
    logger = trainer.loggers[0]
    if getattr(logger, "log_dir", None) is not None:
        return folder
    parts: list[Any] = []
    # A service that cannot be reached fails here first; that is told when the logger is asked to log.
    with contextlib.suppress(Exception):
        getattr(logger, "experiment", None)  # begins the run, which has no version before
        parts = [part for part in (logger.name, logger.version) if part not in {None, ""}]
    return os.path.join(logger.save_dir or trainer.default_root_dir, *map(str, parts))


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
        load_beside(trainer, "trainer.states").TrainerFn.PREDICTING,
        ckpt_path,
        model_provided=True,
        model_connected=connected,
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
        if hasattr(trainer._callback_connector, "_pending_litmodels_tip"):  # not in older versions
            stack.enter_context(preserved(trainer._callback_connector, "_pending_litmodels_tip"))
            trainer._callback_connector._pending_litmodels_tip = False
        stack.enter_context(_preserved_interrupt())
        for loop in loops:
            stack.enter_context(preserved(loop, "_combined_loader"))
            stack.enter_context(preserved(loop._data_source, "instance"))
        _stop_display(host.callbacks)
        host.callbacks = callbacks
        dummy = load_beside(trainer, "loggers.logger").DummyLogger
        trainer.loggers = [dummy() for _ in trainer.loggers]
        host.profiler = load_beside(trainer, "profilers").PassThroughProfiler()
        host.datamodule = None
        trainer.limit_predict_batches = 1.0
        trainer.predict_loop = type(trainer.predict_loop)(trainer, inference_mode=False)
        trainer.state = type(trainer.state)()
        trainer.strategy.checkpoint_io = ExplainingCheckpointIO(trainer.strategy.checkpoint_io)
        trainer._checkpoint_connector._ckpt_path = None
        trainer._checkpoint_connector._user_managed = False
        yield


@contextlib.contextmanager
def loading_into(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let checkpoints be loaded into a module itself, not into what the Trainer runs it in.

    Strategies that shard parameters load by the names of these; all others ask the module for them.
    """
    strategy: Any = trainer.strategy
    if not splits_parameters(trainer):
        yield
        return
    original = strategy.load_checkpoint

    def load(*args: Any, **kwargs: Any) -> Any:
        shown, strategy.model = strategy.model, module
        try:
            return original(*args, **kwargs)
        finally:
            strategy.model = shown

    strategy.load_checkpoint = load
    try:
        yield
    finally:
        del strategy.load_checkpoint


def _stop_display(callbacks: list[Callback]) -> None:
    """Close the finished display of a fit, open until teardown: a second one would break its closing."""
    for callback in callbacks:
        progress: Any = getattr(callback, "progress", None)
        if is_lightning(callback, "RichProgressBar") and progress is not None:
            progress.stop()


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


class _Labelled:
    """A progress bar whose text for a pass can be set."""

    label = "Influence"

    @property
    def predict_description(self) -> str:
        return self.label


def make_labelled_bar(trainer: Trainer) -> Any:
    """Make a progress bar of the Trainer's kind with a ``label`` to set, or None if it shows none."""
    host: Any = trainer
    bar = next((c for c in host.callbacks if is_lightning(c, "ProgressBar")), None)
    if bar is None or not getattr(bar, "is_enabled", True):
        return None
    bars = load_beside(bar, "callbacks")
    if is_lightning(bar, "RichProgressBar"):
        rich = type("LabelledRichBar", (_Labelled, bars.RichProgressBar), {})
        return rich(refresh_rate=int(bar.refresh_rate), theme=bar.theme, console_kwargs=bar._console_kwargs)
    plain = type("LabelledTQDMBar", (_Labelled, bars.TQDMProgressBar), {})
    if is_lightning(bar, "TQDMProgressBar"):
        return plain(refresh_rate=bar.refresh_rate, process_position=bar.process_position)
    return plain()


def read_progress(trainer: Trainer) -> dict[str, Any]:
    """Copy how far a Trainer's fit is: what its epoch and step are computed from."""
    return copy.deepcopy({name: progress.state_dict() for name, progress in _progresses(trainer).items()})


def set_progress(trainer: Trainer, progress: Mapping[str, Any]) -> None:
    """Set how far a Trainer's fit is; nothing else of the fit is touched.

    Args:
        trainer: the Trainer.
        progress: from :func:`read_progress`, or the state of the fit loop in a checkpoint,
            ``checkpoint["loops"]["fit_loop"]``.
    """
    for name, own in _progresses(trainer).items():
        if name in progress:
            own.load_state_dict(copy.deepcopy(progress[name]))


def _progresses(trainer: Trainer) -> dict[str, Any]:
    loop = trainer.fit_loop.epoch_loop
    return {
        "epoch_progress": trainer.fit_loop.epoch_progress,
        "epoch_loop.batch_progress": loop.batch_progress,
        "epoch_loop.scheduler_progress": loop.scheduler_progress,
        "epoch_loop.automatic_optimization.optim_progress": loop.automatic_optimization.optim_progress,
        "epoch_loop.manual_optimization.optim_step_progress": loop.manual_optimization.optim_step_progress,
    }


def make_idle_trainer(module: LightningModule, progress: Mapping[str, Any]) -> Trainer:
    """Make a Trainer that runs nothing, for a module that asks its Trainer how far the training is.

    Args:
        module: the module, whose package of Lightning the Trainer is of.
        progress: the state of the fit loop in a checkpoint.

    Returns:
        The Trainer; the module is not attached to it.
    """
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    with _quiet(load_beside(module).__name__):
        trainer: Trainer = load_beside(module).Trainer(
            accelerator="cpu", devices=1, **dict.fromkeys(off, False)
        )
    set_progress(trainer, progress)
    return trainer


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A Trainer that is made says which accelerators there are; this one is not the user's."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


_LAST_FIT = "_influence_last_fit"


def keep_last_fit(trainer: Trainer) -> None:
    """Remember the loader and the datamodule of a fit: Lightning forgets them at the next ``test``."""
    host: Any = trainer
    setattr(trainer, _LAST_FIT, (trainer.train_dataloader, host.datamodule))


def find_last_fit(trainer: Trainer) -> tuple[Any, Any]:
    """Find the training loader and the datamodule of the last fit; None for what there was not."""
    host: Any = trainer
    loader = trainer.train_dataloader
    kept: tuple[Any, Any] = getattr(trainer, _LAST_FIT, (None, None))
    return kept if loader is None else (loader, host.datamodule)
