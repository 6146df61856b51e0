"""The private corners of Lightning that the passes touch, one function for each purpose.

No other file reads or writes an underscored attribute of Lightning. Everything here is a context manager
that puts back what it found, or a question that changes nothing. ``tests/test__lightning.py`` names every
attribute, so that a new Lightning that moves one of them fails there first.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_influence.errors import UnsupportedTrainerError

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
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
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
def preserved(owner: Any, *names: str) -> Iterator[None]:
    """Put the named instance attributes of ``owner`` back on exit, whatever happened to them.

    Raises:
        UnsupportedTrainerError: if ``owner`` has no such attribute.
    """
    missing = [name for name in names if name not in vars(owner)]
    if missing:
        raise UnsupportedTrainerError(
            f"{type(owner).__name__} has no attribute {', '.join(missing)} in this version of Lightning; "
            "install a version that the package's requirements accept (lightning>=2.6.6,<2.7)."
        )
    saved = {name: vars(owner)[name] for name in names}
    try:
        yield
    finally:
        vars(owner).update(saved)


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


@contextlib.contextmanager
def borrowed_module(module: LightningModule) -> Iterator[None]:
    """Lend the user's module to passes: eval mode, no logging, gradients set aside; all put back on exit.

    Covers every submodule's mode, every parameter's ``grad``, ``requires_grad`` and dtype, the device, the
    ``trainer`` reference and the ``log`` and ``log_dict`` of the module and of LightningModules inside it.
    """
    inner = [m for m in module.modules() if isinstance(m, LightningModule)]
    modes = [(m, m.training) for m in module.modules()]
    # `Module.to` gives a parameter new data and leaves the old tensor as it was: to hold it costs nothing.
    weights = [(p, p.data) for p in module.parameters()]
    buffers = [(m, name, b) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
    grads = [(p, p.grad, p.requires_grad) for p in module.parameters()]
    device = module.device
    with contextlib.ExitStack() as stack:
        for part in inner:
            stack.enter_context(preserved(part, "_trainer", "_current_fx_name", "_device", "_dtype"))
            stack.enter_context(_muted(part))
        try:
            module.eval()
            for parameter, _, _ in grads:
                parameter.grad = None
            yield
        finally:
            for submodule, training in modes:
                submodule.training = training
            if module.device != device:
                module.to(device)
            _restore_dtypes(weights, buffers)
            for parameter, grad, requires_grad in grads:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


def _restore_dtypes(
    weights: list[tuple[nn.Parameter, Tensor]], buffers: list[tuple[nn.Module, str, Tensor]]
) -> None:
    # Precisions like "64-true" convert the model itself.
    for parameter, data in weights:
        if parameter.dtype != data.dtype:
            parameter.data = data
    for owner, name, buffer in buffers:
        if getattr(owner, name).dtype != buffer.dtype:
            setattr(owner, name, buffer)


@contextlib.contextmanager
def _muted(module: LightningModule) -> Iterator[None]:
    names = ("log", "log_dict")
    own = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update(dict.fromkeys(names, _ignore))
    try:
        yield
    finally:
        for name in names:
            vars(module).pop(name, None)
        vars(module).update(own)


def _ignore(*args: object, **kwargs: object) -> None:
    """Stands in for ``log`` and ``log_dict``."""


def unwrap_compiled(model: object) -> LightningModule:
    """Return the LightningModule itself, also from ``torch.compile(model)``.

    Raises:
        TypeError: if ``model`` is not a LightningModule of the ``lightning`` package.
    """
    inner = getattr(model, "_orig_mod", model) if isinstance(model, nn.Module) else model
    if isinstance(inner, LightningModule):
        return inner
    hint = ""
    if any(cls.__module__.startswith("pytorch_lightning") for cls in type(inner).__mro__):
        hint = " This one comes from pytorch_lightning: import from lightning.pytorch instead."
    raise TypeError(f"Expected a lightning.pytorch.LightningModule, got {type(inner).__name__}.{hint}")


class _LabelledRichBar(RichProgressBar):
    label = "Influence"

    @property
    def predict_description(self) -> str:
        return self.label


class _LabelledTQDMBar(TQDMProgressBar):
    label = "Influence"

    @property
    def predict_description(self) -> str:
        return self.label


def labelled_bar(trainer: Trainer) -> _LabelledRichBar | _LabelledTQDMBar | None:
    """Return a progress bar of the Trainer's kind with a ``label`` to set, or None if it shows none."""
    host: Any = trainer
    bar = next((c for c in host.callbacks if isinstance(c, ProgressBar)), None)
    if bar is None or not getattr(bar, "is_enabled", True):
        return None
    if isinstance(bar, RichProgressBar):
        return _LabelledRichBar(
            refresh_rate=int(bar.refresh_rate), theme=bar.theme, console_kwargs=bar._console_kwargs
        )
    if isinstance(bar, TQDMProgressBar):
        return _LabelledTQDMBar(refresh_rate=bar.refresh_rate, process_position=bar.process_position)
    return _LabelledTQDMBar()


def wrapped_sampler(sampler: object) -> object | None:
    """Return the user's sampler inside the one that Lightning wraps it in for distributed runs, or None."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", None)


def combined_mode(loader: CombinedLoader) -> str:
    """Return how a ``CombinedLoader`` goes through its loaders."""
    return loader._mode


def defines(owner: object, hook: str) -> bool:
    """Return whether a LightningModule or LightningDataModule overrides a hook of its base class."""
    return is_overridden(hook, owner)
