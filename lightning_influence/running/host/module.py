"""The user's module: lending it to passes, with logging muted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_influence.running.host.attributes import preserved


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
            stack.enter_context(muted(part))
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
        TypeError: if ``model`` is not a LightningModule of the ``lightning`` package.
    """
    inner = getattr(model, "_orig_mod", model) if isinstance(model, nn.Module) else model
    if isinstance(inner, LightningModule):
        return inner
    hint = ""
    if any(cls.__module__.startswith("pytorch_lightning") for cls in type(inner).__mro__):
        hint = " This one comes from pytorch_lightning: import from lightning.pytorch instead."
    raise TypeError(f"Expected a lightning.pytorch.LightningModule, got {type(inner).__name__}.{hint}")
