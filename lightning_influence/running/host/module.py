"""The user's module: lending it to passes, with logging muted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_influence.running.host.attributes import defines, preserved
from lightning_influence.running.host.packages import is_lightning, load_beside
from lightning_influence.running.host.states import ModuleStates
from lightning_influence.support.notes import warn


@contextlib.contextmanager
def borrowed_module(module: LightningModule) -> Iterator[None]:
    """Lend the user's module to passes: eval mode, no logging, gradients set aside; all put back on exit.

    Covers every submodule's mode, every parameter's ``grad``, ``requires_grad`` and dtype, the device, the
    ``trainer`` reference and the ``log`` and ``log_dict`` of the module and of LightningModules inside it.
    """
    inner: list[Any] = [m for m in module.modules() if is_lightning(m, "LightningModule")]
    modes = [(m, m.training) for m in module.modules()]
    # `Module.to` gives a parameter new data and leaves the old tensor as it was: to hold it costs nothing.
    weights = [(p, p.data) for p in module.parameters()]
    buffers = [(m, name, b) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
    grads = [(p, p.grad, p.requires_grad) for p in module.parameters()]
    device = module.device
    with contextlib.ExitStack() as stack:
        for part in inner:
            if "_trainer" not in vars(part):  # let go of by its owner after a fit
                part._trainer = None
                stack.callback(vars(part).pop, "_trainer", None)
            stack.enter_context(preserved(part, "_trainer", "_current_fx_name", "_device", "_dtype"))
            stack.enter_context(muted(part))
        _unscale_tables(module, stack)
        try:
            enter_eval_mode(module)
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


def _unscale_tables(module: nn.Module, stack: contextlib.ExitStack) -> None:
    """Let tables have gradients of the loss, whatever else is in a batch; name those that had not."""
    tables = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.scale_grad_by_freq
    }
    for table in tables.values():
        stack.enter_context(preserved(table, "scale_grad_by_freq"))
        table.scale_grad_by_freq = False
    if tables:
        warn(
            f"scale_grad_by_freq=True of {list(tables)} divides a row's gradient by how often it comes in "
            "a batch, so that it depends on the other examples. Influence is of the gradients without that: "
            "leave these layers out with layers= where that is not what is asked.",
            stacklevel=3,
        )


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
def preserved_states(module: nn.Module) -> Iterator[ModuleStates]:
    """Put back on exit what running a training step changes, see :class:`.states.ModuleStates`."""
    states = ModuleStates(module)
    try:
        yield states
    finally:
        states.restore()


@contextlib.contextmanager
def muted(module: LightningModule) -> Iterator[None]:
    """Let the module's ``log`` and ``log_dict`` do nothing."""
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
        TypeError: if ``model`` is not a LightningModule.
    """
    inner: Any = getattr(model, "_orig_mod", model) if isinstance(model, nn.Module) else model
    if is_lightning(inner, "LightningModule") and not isinstance(inner, type):
        found: LightningModule = inner
        return found
    raise TypeError(
        f"Expected a LightningModule of lightning.pytorch or pytorch_lightning, got {type(inner).__name__}."
    )


class TrainingStage:
    """A context in which the Trainer of a module, if it has one, says that it is training, as in a fit.

    Args:
        module: the user's module.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._trainer: Any = None
        self._before: tuple[Any, Any] = (None, None)
        states = load_beside(module, "trainer.states")
        self._training = states.TrainerFn.FITTING, states.RunningStage.TRAINING

    def __enter__(self) -> None:
        """Set the Trainer's state."""
        self._trainer = self._module._trainer  # asked now: the first pass attaches one
        if self._trainer is not None:
            state = self._trainer.state
            self._before = state.fn, state.stage
            state.fn, state.stage = self._training

    def __exit__(self, *error: object) -> None:
        """Put the Trainer's state back."""
        if self._trainer is not None:
            self._trainer.state.fn, self._trainer.state.stage = self._before


def enter_eval_mode(module: LightningModule) -> None:
    """Put a module in the mode that its author wants for evaluation.

    That is ``eval()``, and then the module's own ``on_validation_model_eval`` if it has one, which may leave
    parts in training mode.
    """
    module.eval()
    if not defines(module, "on_validation_model_eval"):
        return
    with preserved(module, "_trainer"):
        # Lightning's own hook, which `super()` calls, asks the Trainer for the model that it runs.
        vars(module)["_trainer"] = _RunsThisModule(module, vars(module)["_trainer"])
        module.on_validation_model_eval()


class _RunsThisModule:
    """A Trainer, or none, that says it runs a module."""

    def __init__(self, module: LightningModule, trainer: Any) -> None:
        self.model = self.lightning_module = module
        self._trainer = trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)
