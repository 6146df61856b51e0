"""One recorded call of a loss function, and when two values or two losses are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.errors import LossCaptureError
from lightning_influence.losses.base import OutputLoss
from lightning_influence.losses.registry import is_supported, loss_name, parse, supported_losses


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference that two values of one loss may have: 1e-8 in float64, else 1e-4."""
    return 1e-8 if dtype == torch.float64 else 1e-4


def versions_of(tensors: Iterable[Any]) -> tuple[int, ...]:
    """Return how often each tensor was changed in place; inference tensors do not count it."""
    return tuple(t._version for t in tensors if isinstance(t, Tensor) and not t.is_inference())


@dataclass(frozen=True, eq=False)
class LossCall:
    """One recorded call of a loss function.

    Attributes:
        function: the torch function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        value: a copy of what it returned.
        node: the autograd node of what it returned.
        versions: of its tensor arguments, to notice changes in place after the call.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    value: Tensor
    node: object
    versions: tuple[int, ...]

    def read(self, batch_size: int) -> OutputLoss:
        """Return the call as a loss of ``batch_size`` examples.

        Raises:
            LossCaptureError: if the function, its arguments or the number of its rows cannot be worked with.
        """
        if not is_supported(self.function):
            raise LossCaptureError(
                f"{loss_name(self.function)} has no known output curvature. Accepted are "
                f"{supported_losses()}."
            )
        if self.versions != versions_of((*self.args, *self.kwargs.values())):
            raise LossCaptureError(
                f"An argument of {loss_name(self.function)} was changed in place after the call. Accepted "
                "are outputs and targets that stay as they were: change a copy."
            )
        loss = parse(self.function, self.args, self.kwargs)
        rows = loss.outputs.shape[0]
        if rows == 0 or rows % batch_size:
            raise LossCaptureError(
                f"The loss was computed on {rows} rows (outputs of shape {tuple(loss.outputs.shape)}), which "
                f"is no multiple of the batch size {batch_size}. Accepted are B rows, or B * T with the T "
                "positions of each example together: do not drop rows before the loss, mark them with "
                "`ignore_index`."
            )
        return replace(loss, num_examples=batch_size)

    def has_value(self, batch_loss: Tensor) -> bool:
        """Return whether the call gave one number, and that is the batch's loss."""
        return self.value.numel() == 1 and same_value(self.value, batch_loss)

    def describe(self) -> str:
        """Return the call for a message: name, shape or value, and whether it can be read."""
        value = self.value
        shown = f"{value.item():.6g}" if value.numel() == 1 else f"values of shape {tuple(value.shape)}"
        if value.numel() > 1:
            shown += f" with mean {value.mean().item():.6g}"
        known = "" if is_supported(self.function) else " (not a supported loss)"
        return f"{loss_name(self.function)} = {shown}{known}"


def same_value(value: Tensor, batch_loss: Tensor) -> bool:
    """Return whether two scalars agree to the tolerance of the less precise one."""
    limit = max(tolerance(value.dtype), tolerance(batch_loss.dtype))
    a, b = value.double().reshape(()), batch_loss.to(value.device).double().reshape(())
    return bool((a - b).abs() <= limit * b.abs())


def same_loss(first: OutputLoss, second: OutputLoss) -> bool:
    """Return whether two calls are one and the same loss: of one kind, on equal outputs and targets."""
    return type(first) is type(second) and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in ((first.outputs, second.outputs), (first.targets, second.targets))
    )
