"""The table of loss functions: which can be read, by which parser, and which are only known by name.

A parser takes the arguments of its torch function under the same names and returns the ``OutputLoss`` of that
call. It knows nothing of the batch: it sets
``num_examples`` to the number of rows, which the capture corrects.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from lightning_influence.model.losses.loss import OutputLoss, Reduction
from lightning_influence.support.errors import LossCaptureError

Parser = Callable[..., OutputLoss]
P = TypeVar("P", bound=Parser)

_PARSERS: dict[Callable[..., Any], Parser] = {}
_TORCH_REDUCTIONS: dict[str, Reduction] = {"mean": "mean", "sum": "sum", "none": "none"}
_EXTRA_LOSSES = ("cross_entropy", "binary_cross_entropy", "linear_cross_entropy", "kl_div")


def register(function: Callable[..., Any]) -> Callable[[P], P]:
    """Make the decorated function the parser of a torch loss function.

    Args:
        function: the torch function, such as ``F.cross_entropy``. Registering it again replaces its parser.

    Returns:
        The decorator; it returns its parser unchanged.
    """

    def add(parser: P) -> P:
        _PARSERS[function] = parser
        find_losses.cache_clear()
        return parser

    return add


def is_supported(function: Callable[..., Any]) -> bool:
    """Return whether calls of this function can be read."""
    return function in _PARSERS


def supported_losses() -> str:
    """Return the names of the functions that can be read, for messages."""
    return ", ".join(sorted(loss_name(function) for function in _PARSERS))


def loss_name(function: Callable[..., Any]) -> str:
    """Return the name under which users know a loss function, such as ``F.cross_entropy``."""
    name = getattr(function, "__name__", repr(function))
    return f"F.{name}" if getattr(functional, name, None) is function else name


def parse(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> OutputLoss:
    """Read one call of a registered loss function.

    Args:
        function: the torch function that was called.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if the call uses something that the library cannot work with.
    """
    parser = _PARSERS[function]
    signature = inspect.signature(parser)
    # Torch passes on every argument, also those that a later version adds and the user leaves unset.
    given = {key: value for key, value in kwargs.items() if key in signature.parameters or value is not None}
    try:
        bound = signature.bind(*args, **given)
    except TypeError as error:
        raise LossCaptureError(
            f"{loss_name(function)} was called with arguments that this version of the library does not "
            f"know: {error}."
        ) from error
    return parser(*bound.args, **bound.kwargs)


@functools.cache
def find_losses() -> frozenset[Callable[..., Any]]:
    """Return every function whose calls are recorded: the supported ones and torch's other losses."""
    names = {name for name in dir(functional) if name.endswith("_loss") and not name.startswith("_")}
    names.update(_EXTRA_LOSSES, (loss.__name__ for loss in _PARSERS))
    found = {
        getattr(home, name)
        for home in (functional, torch)
        for name in names
        if callable(getattr(home, name, None))
    }
    return frozenset(found | set(_PARSERS))


def reduction_of(reduction: str, size_average: bool | None, reduce: bool | None) -> Reduction:
    """Torch's reduction, with its two deprecated arguments honoured as torch does.

    Args:
        reduction: ``mean``, ``sum`` or ``none``.
        size_average: deprecated; False means a sum.
        reduce: deprecated; False means no reduction.

    Returns:
        The reduction in force.

    Raises:
        LossCaptureError: if torch does not know the reduction either.
    """
    if size_average is not None or reduce is not None:
        return "none" if reduce is False else "sum" if size_average is False else "mean"
    if reduction in _TORCH_REDUCTIONS:
        return _TORCH_REDUCTIONS[reduction]
    raise LossCaptureError(f"Got reduction={reduction!r}; accepted are 'mean', 'sum' and 'none'.")


def constant(name: str, value: Tensor, *, non_negative: bool = False) -> Tensor:
    """Check that an argument of a loss does not depend on the parameters.

    Args:
        name: what to call it in the message.
        value: the argument.
        non_negative: whether negative entries are an error too (they would make the curvature indefinite).

    Returns:
        The argument.

    Raises:
        LossCaptureError: if it requires a gradient, or is negative where it must not be.
    """
    if value.requires_grad:
        raise LossCaptureError(
            f"The loss was called with a {name} that requires a gradient. Only the model's outputs may "
            f"depend on the parameters: detach the {name}, or define `influence_loss(batch) -> (B,)` on the "
            "module."
        )
    if non_negative and bool((value < 0).any()):
        raise LossCaptureError(
            f"The loss was called with a negative {name} (least value {value.min().item():.4g}). Accepted "
            "are values of at least 0: the curvature of the loss would be indefinite."
        )
    return value
