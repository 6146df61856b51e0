"""Find the training loss inside a step that was written without this library in mind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from lightning_influence.model.losses.loss import OutputLoss, Reduction
from lightning_influence.model.losses.registry import (
    find_losses,
    is_supported,
    loss_name,
    parse,
    supported_losses,
)
from lightning_influence.support.errors import LossCaptureError, NonFiniteError


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
        if is_supported(self.function) and self.versions != versions_of((*self.args, *self.kwargs.values())):
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


_LISTED = 10
_REMEDY = (
    "To solve it, define `influence_loss(batch) -> (B,)` on the module: the training loss of each example of "
    "the batch."
)


class LossCapture(TorchFunctionMode):
    """Context manager that records calls of torch's loss functions whose result requires a gradient.

    The calls of ``nn.CrossEntropyLoss`` and other loss modules are recorded as those of the functions they
    call. A loss that runs inside a compiled function is not seen; compiled submodules before the loss do no
    harm. Entering it again forgets earlier calls. The recorded calls hold on to the autograd graph:
    :meth:`clear` lets it go.

    Example:
        >>> logits = torch.zeros(4, 3, requires_grad=True)
        >>> with LossCapture() as capture:
        ...     value = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
        >>> loss = capture.resolve(value, batch_size=4)
        >>> loss.num_examples, loss.reduction, round(loss.batch_value().item(), 4)
        (4, 'mean', 1.0986)
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._losses = find_losses()

    def __enter__(self) -> Self:
        """Start recording, with an empty list of calls.

        Returns:
            The capture itself.
        """
        self.clear()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function, and keep the call if it is a loss.

        Returns:
            What the function returns.
        """
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the compiler must not trace what follows
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in self._losses and isinstance(result, Tensor) and result.requires_grad:
            versions = versions_of((*args, *kwargs.values()))
            # A copy, because `loss += penalty` would change the value that was seen.
            value = result.detach().clone()
            self.calls.append(LossCall(func, args, kwargs, value, result.grad_fn, versions))
        return result

    def clear(self) -> None:
        """Forget the recorded calls and their graph."""
        self.calls = []

    @torch.no_grad()
    def resolve(self, batch_loss: Tensor, batch_size: int) -> OutputLoss:
        """Find the call that is the training loss.

        Args:
            batch_loss: what the training step returned, one element, before any division for accumulation.
            batch_size: number of examples ``B``.

        Returns:
            The loss, with its outputs attached to the graph, and the reduction that gives the batch's loss:
            after ``reduction="none"`` or a sum, the user's own ``.mean()``, ``.sum()``, or division by ``B``
            is recognised.

        Raises:
            LossCaptureError: if no call reproduces the loss, or several do, or it cannot be read.
            NonFiniteError: if the loss is NaN or infinite.
            ValueError: if the batch size is not positive.
        """
        _check_request(batch_loss, batch_size)
        if not self.calls:
            raise LossCaptureError(_message_no_calls(batch_loss))
        with torch._C.DisableTorchFunction():
            return self._choose(batch_loss, batch_size)

    def _choose(self, batch_loss: Tensor, batch_size: int) -> OutputLoss:
        """Return the call that reproduces the loss: its very result, its value, or a reduction of it.

        Raises:
            LossCaptureError: if none does, or several, or it cannot be read.
        """
        for matches in (
            [call for call in self.calls if call.node is batch_loss.grad_fn and call.has_value(batch_loss)],
            [call for call in self.calls if call.has_value(batch_loss)],
        ):
            if matches:
                return _single(_read(matches, batch_loss, batch_size), matches, batch_loss)
        derived = [(call, _derived(call, batch_loss, batch_size)) for call in self.calls]
        found = [(call, loss) for call, loss in derived if loss is not None]
        if not found:
            raise LossCaptureError(_message_not_reproduced(self.calls, batch_loss, batch_size))
        return _single([loss for _, loss in found], [call for call, _ in found], batch_loss)


def _read(calls: Sequence[LossCall], batch_loss: Tensor, batch_size: int) -> list[OutputLoss]:
    """Return the losses of the calls that have the batch's value.

    Raises:
        LossCaptureError: if one of them cannot be read; the message names it.
    """
    losses = []
    for call in calls:
        try:
            loss = call.read(batch_size)
        except LossCaptureError as error:
            raise LossCaptureError(
                f"The training loss is {batch_loss.item():.6g}, the value of this call:\n{_listing([call])}\n"
                f"{error} {_REMEDY}"
            ) from error
        losses.append(replace(loss, reduction="position_mean") if loss.reduction == "none" else loss)
    return losses


def _derived(call: LossCall, batch_loss: Tensor, batch_size: int) -> OutputLoss | None:
    """Return the loss under the reduction that the user applied to a call's values, None if none fits."""
    try:
        loss = call.read(batch_size)
    except LossCaptureError:
        return None
    if loss.reduction == "mean":
        return None
    for reduction, value in _candidates(call, loss):
        if same_value(value, batch_loss):
            return replace(loss, reduction=reduction)
    return None


def _candidates(call: LossCall, loss: OutputLoss) -> Iterator[tuple[Reduction, Tensor]]:
    """What the usual reductions make of a call's values, in the user's arithmetic where it is known."""
    total = call.value.sum()
    yield "mean", replace(loss, reduction="mean").batch_value()
    yield "sum", total
    plain = (
        call.value.mean()
        if call.value.numel() > 1
        else replace(loss, reduction="position_mean").batch_value()
    )
    yield "position_mean", plain
    yield "example_mean", total / loss.num_examples


def _single(losses: Sequence[OutputLoss], calls: Sequence[LossCall], batch_loss: Tensor) -> OutputLoss:
    """Return the first of the losses if the others are the same loss computed once more.

    Raises:
        LossCaptureError: if they differ.
    """
    if any(not same_loss(losses[0], other) for other in losses[1:]):
        raise LossCaptureError(
            f"The training loss is {batch_loss.item():.6g}, and {len(calls)} different calls have that value:"
            f"\n{_listing(calls)}\nAccepted is exactly one. {_REMEDY}"
        )
    return losses[0]


def _listing(calls: Sequence[LossCall]) -> str:
    """Return the calls, one a line."""
    lines = [f"  {i}. {call.describe()}" for i, call in enumerate(calls[:_LISTED], start=1)]
    if len(calls) > _LISTED:
        lines.append(f"  and {len(calls) - _LISTED} more")
    return "\n".join(lines)


def _message_no_calls(batch_loss: Tensor) -> str:
    return (
        f"The training loss is {batch_loss.item():.6g}, but no loss function was seen that depends on the "
        f"parameters. Accepted is one call of {supported_losses()}. A loss written out by hand, or computed "
        "inside a function under `torch.compile`, cannot be seen (compile the network and not its loss). "
        f"{_REMEDY}"
    )


def _message_not_reproduced(calls: Sequence[LossCall], batch_loss: Tensor, batch_size: int) -> str:
    reasons = []
    for call in calls:
        try:
            call.read(batch_size)
        except LossCaptureError as error:
            reasons.append(str(error))
    scalars = [call.value for call in calls if call.value.numel() == 1]
    if len(scalars) > 1 and same_value(
        torch.stack([value.double().reshape(()) for value in scalars]).sum(), batch_loss
    ):
        reasons.append("The training loss is the sum of several of these calls.")
    else:
        reasons.append("A penalty, a factor or a second term in the training loss has this effect.")
    return (
        f"The training loss is {batch_loss.item():.6g}, and no single call of a loss function has that "
        f"value. Seen:\n{_listing(calls)}\n{' '.join(dict.fromkeys(reasons))} Accepted is one call of "
        f"{supported_losses()} that is the whole training loss. {_REMEDY}"
    )


def _check_request(batch_loss: Tensor, batch_size: int) -> None:
    """Refuse what can be no training loss of a batch.

    Raises:
        LossCaptureError: if the loss is not one number.
        NonFiniteError: if it is NaN or infinite.
        ValueError: if the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"Got batch_size={batch_size}; accepted are positive integers.")
    if batch_loss.numel() != 1:
        raise LossCaptureError(
            f"Got a training loss of shape {tuple(batch_loss.shape)}; accepted is a single number. {_REMEDY}"
        )
    if not bool(torch.isfinite(batch_loss).all()):
        raise NonFiniteError(
            f"The training loss is {batch_loss.item()}. Accepted are finite losses: look at the learning "
            "rate, the inputs and the targets of this batch."
        )
