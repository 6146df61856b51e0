"""The user's ``training_step``, or hook, run outside of a fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_influence.model.training_mode import run_in_mode
from lightning_influence.support.batches import copy_tensors
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError, add_note

_OUTSIDE_FIT = (
    "This was raised by the module's `training_step`, which influence runs on training and query batches, in "
    "eval mode and outside of a fit. If it needs what only a fit has (optimizers, a logger), or query "
    "batches are of another form, define `influence_loss(batch) -> (B,)` on the module: the loss of each "
    "example of the batch."
)


def call_loss(module: Any, batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Run the hook ``influence_loss`` if there is one, else ``training_step``.

    Returns:
        ``(per-example values, None)`` from the hook, or ``(None, batch loss)``.
    """
    hook = getattr(module, "influence_loss", None)
    if callable(hook):
        return hook(copy_tensors(batch)), None
    return None, run_step(module, batch)


def call_own_loss(
    loss: Callable[[Any, Any], Any], module: Any, batch: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Run the loss that a call was given.

    Returns:
        ``(per-example values, None)``, or ``(None, batch loss)``.

    Raises:
        TypeError: if it returns no tensor.
    """
    result = loss(module, copy_tensors(batch))
    if not isinstance(result, Tensor):
        raise TypeError(
            f"loss= returned {type(result).__name__}; accepted is a tensor, of shape (B,) or a single number."
        )
    return (None, result) if result.dim() == 0 else (result, None)


def run_step(module: Any, batch: Any) -> Tensor:
    """Run ``training_step``.

    Returns:
        Its loss.

    Raises:
        LossCaptureError: if it returns none.
        UnsupportedModelError: if the module optimizes manually.
    """
    if not getattr(module, "automatic_optimization", True):
        raise UnsupportedModelError(
            "The module optimizes manually, so its `training_step` cannot be run without changing the "
            "weights. Define `influence_loss(self, batch)`, which returns the per-example training loss as a "
            "tensor of shape (B,)."
        )
    _step_arguments(module, batch)  # refuses a step that draws its own batches, in any mode
    try:
        # A step may change the batch in place, which is the user's, and is run again on it by checks.
        result = run_in_mode(
            module, lambda: module.training_step(*_step_arguments(module, copy_tensors(batch)))
        )
    except Exception as error:
        add_note(error, _OUTSIDE_FIT)
        raise
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor):
        raise LossCaptureError(
            f"`training_step` returned {type(result).__name__} without a loss tensor; accepted are a scalar "
            "tensor or a dict with the key 'loss'. If it skips batches, define `influence_loss(batch) -> "
            "(B,)` on the module."
        )
    return loss


def _step_arguments(module: Any, batch: Any) -> tuple[Any, ...]:
    """Collect positional arguments of ``training_step``: the batch, and 0 for every further required one.

    Returns:
        The arguments.

    Raises:
        UnsupportedModelError: if the step takes an iterator.
    """
    parameters = list(inspect.signature(module.training_step).parameters.values())
    if parameters and parameters[0].name == "dataloader_iter":
        raise UnsupportedModelError(
            "`training_step(dataloader_iter)` draws its own batches; influence passes need "
            "`training_step(batch, ...)` or the hook `influence_loss(batch) -> (B,)`."
        )
    required = [
        p
        for p in parameters[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    # Lightning gives the batch's number to `training_step(self, *args)` as well.
    variadic = bool(parameters) and parameters[0].kind is parameters[0].VAR_POSITIONAL
    return (batch, *(0 for _ in required), *((0,) if variadic else ()))
