"""One recorded call of a loss function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.model.losses.ragged import RaggedLoss
from lightning_influence.model.losses.registry import is_supported, loss_name, parse
from lightning_influence.support.errors import LossCaptureError


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
        output_number: which output of the node it is.
        versions: of its tensor arguments, to notice changes in place after the call.
        picked: whether it has as many rows as a mask has left, which are nobody's by their number.
        order: numbers of its rows in the order of the examples, ``(R,)``, where they come in another.
        owners: the example of each of its rows, ``(R,)``, where these may have different numbers of them.
        is_packed: whether hooks have packed what its node saved, so that looking at that runs them.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    value: Tensor
    node: Any
    output_number: int
    versions: tuple[int, ...]
    picked: bool = False
    order: Tensor | None = None
    owners: Tensor | None = None
    is_packed: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensor arguments."""
        return [part for part in (*self.args, *self.kwargs.values()) if isinstance(part, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor], value: Tensor) -> LossCall:
        """Return a call on other tensors, with the value that it had."""
        parts = iter(tensors)
        args = tuple(next(parts) if isinstance(part, Tensor) else part for part in self.args)
        kwargs = {
            name: next(parts) if isinstance(part, Tensor) else part for name, part in self.kwargs.items()
        }
        return replace(self, args=args, kwargs=kwargs, value=value, node=None, versions=versions_of(tensors))

    @property
    def is_followed(self) -> bool:
        """Whether it is known of each row whose it is."""
        return self.order is not None or self.owners is not None

    @property
    def outputs(self) -> Tensor:
        """The first argument: the outputs that it is a loss of; torch calls it ``input``."""
        arguments = (*self.args, self.kwargs.get("input"), *self.kwargs.values())
        return next(part for part in arguments if isinstance(part, Tensor))

    def read(self, batch_size: int) -> OutputLoss:
        """Return the call as a loss of ``batch_size`` examples.

        Raises:
            LossCaptureError: if the function, its arguments or the number of its rows cannot be worked with.
        """
        loss = parse(self.function, self.args, self.kwargs)
        if self.versions != versions_of(self.tensors):
            raise LossCaptureError(
                f"An argument of {loss_name(self.function)} was changed in place after the call. Accepted "
                "are outputs and targets that stay as they were: change a copy."
            )
        rows = loss.outputs.shape[0]
        if self.picked:
            raise LossCaptureError(
                f"{loss_name(self.function)} was computed on {rows} rows that a mask picked, or an index, or "
                "that are joined from examples of several lengths. Accepted are B rows, or B * T with the T "
                "positions of each example together: mark rows to leave out with `ignore_index`."
            )
        if self.owners is not None and rows == len(self.owners):
            return RaggedLoss.of(loss, self.owners, batch_size)
        if rows == 0 or rows % batch_size:
            raise LossCaptureError(
                f"The loss was computed on {rows} rows (outputs of shape {tuple(loss.outputs.shape)}), which "
                f"is no multiple of the batch size {batch_size}. Accepted are B rows, or B * T with the T "
                "positions of each example together: do not drop rows before the loss, mark them with "
                "`ignore_index`."
            )
        loss = replace(loss, num_examples=batch_size)
        return loss if self.order is None else loss.in_order(self.order)

    def sort_rows(self, values: Tensor) -> Tensor:
        """Return values in the shape of what the function returned, with the examples in their order."""
        return values if self.order is None or not values.dim() else values[self.order.to(values.device)]

    def describe(self) -> str:
        """Return the call for a message: name, shape or value, and whether it can be read."""
        value = self.value
        shown = f"{value.item():.6g}" if value.numel() == 1 else f"values of shape {tuple(value.shape)}"
        if value.numel() > 1:
            shown += f" with mean {value.mean().item():.6g}"
        known = "" if is_supported(self.function) else " (not a supported loss)"
        return f"{loss_name(self.function)} = {shown}{known}"


def is_packed() -> bool:
    """Return whether hooks pack what operations save; also where torch (before 2.6) does not tell."""
    read = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return read is None or read(False) is not None
