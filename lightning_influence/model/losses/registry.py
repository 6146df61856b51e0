"""The table of loss functions: which can be read, by which parser, and which are only known by name.

A parser takes the arguments of its torch function under the same names and returns the ``OutputLoss`` of that
call. It knows nothing of the batch: it sets ``num_examples`` to the number of rows, which the capture
corrects.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.support.errors import LossCaptureError

Parser = Callable[..., OutputLoss]
P = TypeVar("P", bound=Parser)

_PARSERS: dict[Callable[..., Any], tuple[Parser, inspect.Signature]] = {}
# Torch's own; `batchmean` belongs to its divergence alone.
_REDUCTIONS = ("mean", "sum", "none", "batchmean")
_EXTRA_LOSSES = ("cross_entropy", "binary_cross_entropy", "linear_cross_entropy", "kl_div")


def register_loss(function: Callable[..., Any]) -> Callable[[P], P]:
    """Make the decorated function the parser of a loss function.

    Args:
        function: the loss function, such as ``F.cross_entropy``, or one of your own that torch's function
            modes see, as below. Registering it again replaces its parser.

    Returns:
        The decorator; it returns its parser unchanged. The parser takes the function's arguments by their
        names and returns an :class:`~lightning_influence.model.losses.loss.OutputLoss`; torch's deprecated
        ``size_average`` and ``reduce`` are folded into ``reduction`` before it is called.

    Example:
        >>> from torch.overrides import wrap_torch_function
        >>> from lightning_influence.model.losses.mse import SquaredErrorLoss
        >>> @wrap_torch_function(lambda input, target: (input, target))
        ... def my_error(input, target):
        ...     return (input - target).square().mean()
        >>> @register_loss(my_error)
        ... def parse_my_error(input, target):
        ...     return SquaredErrorLoss(input, target, len(input), "mean")
        >>> del _PARSERS[my_error]
    """

    def add(parser: P) -> P:
        _PARSERS[function] = parser, inspect.signature(parser)
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
        function: the loss function that was called.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The loss, with one example per row.

    Raises:
        LossCaptureError: if the function is not registered, or the call uses something that the library
            cannot work with.
    """
    if function not in _PARSERS:
        raise LossCaptureError(
            f"{loss_name(function)} has no known output curvature. Accepted are {supported_losses()}."
        )
    parser, signature = _PARSERS[function]
    given = dict(zip(_argument_names(function), args, strict=False)) if args else {}
    given.update(kwargs)
    size_average, reduce = given.pop("size_average", None), given.pop("reduce", None)
    if size_average is not None or reduce is not None:  # deprecated by torch, which still honours them
        given["reduction"] = "none" if reduce is False else "sum" if size_average is False else "mean"
    # Torch passes on every argument, also those that a later version adds and the user leaves unset.
    given = {key: value for key, value in given.items() if key in signature.parameters or value is not None}
    unknown = sorted(set(given) - set(signature.parameters))
    if unknown:
        raise LossCaptureError(
            f"{loss_name(function)} was called with arguments that this version of the library does not "
            f"know: {unknown}. Accepted are {list(signature.parameters)}."
        )
    reduction = given.get("reduction", "mean")
    if reduction not in _REDUCTIONS:
        raise LossCaptureError(f"Got reduction={reduction!r}; accepted are 'mean', 'sum' and 'none'.")
    return parser(**given)


@functools.cache
def _argument_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the function's arguments, those of its parser if it shows none."""
    try:
        return tuple(inspect.signature(function).parameters)
    except ValueError:  # compiled functions show no signature
        return tuple(_PARSERS[function][1].parameters)


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
