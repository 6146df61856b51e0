"""Checks of what users pass: settings, counts, numbers, names of layers, indices, seeds, subsets, losses."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


Kind = TypeVar("Kind", bound=_Dataclass)


def parse_options(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """Make settings of keyword arguments that a user gave.

    Args:
        kind: a dataclass whose fields are the settings.
        given: values by name.

    Returns:
        The settings.

    Raises:
        TypeError: if there is no such setting; names the nearest, and all that there are.
    """
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"Got an unknown option {name!r}.{hint} Accepted are {', '.join(known)}.")
    return kind(**{name: to_plain_number(value) for name, value in given.items()})


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is an integer or a float, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object, least: int) -> bool:
    """Return whether a value is an integer of at least ``least`` that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**62


def check_count(name: str, value: object, least: int) -> None:
    """Refuse what is no integer of at least ``least``.

    Raises:
        ValueError: naming the setting, what was got and what is accepted.
    """
    if not is_count(value, least):
        raise ValueError(f"Got {name}={value!r}; accepted are integers of at least {least}.")


def check_number(name: str, value: Any, *, below: float = math.inf, positive: bool = False) -> None:
    """Refuse what is no number of at least 0.

    Args:
        name: what the setting is called.
        value: what was got.
        below: numbers from here on are refused too; infinity refuses infinite ones and NaN alone.
        positive: whether 0 is refused.

    Raises:
        ValueError: naming the setting, what was got and what is accepted.
    """
    if not is_number(value) or not 0 <= value < below or (positive and value == 0):
        kind = "finite numbers" if math.isinf(below) else f"numbers below {below:g}"
        raise ValueError(
            f"Got {name}={value!r}; accepted are {kind} {'above' if positive else 'of at least'} 0."
        )


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse what is none of several values.

    Raises:
        ValueError: naming the setting, what was got and all choices.
    """
    choices = [*choices]
    if value not in choices:
        raise ValueError(f"Got {name}={value!r}; accepted are {', '.join(map(repr, choices))}.")


def check_layers(layers: Any) -> None:
    """Refuse what is no list of layers' names.

    Args:
        layers: names or patterns; None for all layers.

    Raises:
        TypeError: saying what was got; of a text, how it is meant to be passed.
    """
    if layers is None:
        return
    accepted = f"Got layers={layers!r}; accepted is a list of names or patterns"
    if isinstance(layers, str):
        raise TypeError(f"{accepted}: layers=[{layers!r}].")
    if not isinstance(layers, Iterable) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"{accepted}.")


def to_plain_number(value: Any) -> Any:
    """Return a number of another library, such as a NumPy scalar, as Python's own; all else as it is.

    Example:
        >>> from fractions import Fraction
        >>> to_plain_number(Fraction(1, 2)), to_plain_number(True), to_plain_number("auto")
        (0.5, True, 'auto')
    """
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def read_examples(examples: Any, count: int) -> list[int]:
    """Read a choice of training examples.

    Args:
        examples: integers, or a boolean mask over all examples.
        count: ``N``, how many there are.

    Returns:
        The indices, as they were given.

    Raises:
        ValueError: if it is neither, empty, or an index is out of range.
    """
    chosen: list[int] = read_indices(examples, torch.arange(count)).tolist()
    if not chosen or not all(0 <= index < count for index in chosen):
        raise ValueError(
            f"examples must be indices of the {count} training examples, got {chosen[:8]}: accepted are 0 to "
            f"{count - 1}, one or more, or a boolean mask over the examples that is true somewhere."
        )
    return chosen


def to_integers(values: Any) -> list[int] | None:
    """Return a sequence, a tensor or an array of integers as a list, None for anything else."""
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        return None
    try:
        return None if any(isinstance(value, bool) for value in values) else [*map(operator.index, values)]
    except TypeError:
        return None


def read_seeds(seeds: Any) -> list[int]:
    """Read the seeds of a retraining.

    Args:
        seeds: a sequence, a tensor or an array.

    Returns:
        The seeds.

    Raises:
        ValueError: if they are no integers, none, or not all different.
    """
    found = to_integers(seeds)
    if not found or len(set(found)) != len(found):
        got = list(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else seeds
        raise ValueError(f"seeds must be a non-empty sequence of different integers, got {got!r}.")
    return found


def check_masks(masks: Any, size: int) -> None:
    """Refuse subsets that do not fit the training set.

    Args:
        masks: kept examples.
        size: ``N``.

    Raises:
        ValueError: saying what was got.
    """
    if not isinstance(masks, Tensor):
        raise ValueError(
            f"masks must be a boolean tensor of shape (M, N) with N = {size} training examples, got a "
            f"{type(masks).__name__}."
        )
    if masks.ndim != 2 or masks.dtype != torch.bool or masks.shape[1] != size or not len(masks):
        raise ValueError(
            f"masks must be boolean of shape (M, N) with M at least 1 and N = {size} training examples, got "
            f"{masks.dtype} of shape {tuple(masks.shape)}."
        )
    if not bool(masks.any(1).all()):
        raise ValueError(
            f"Subset {int((~masks.any(1)).nonzero()[0])} keeps no example; accepted is at least 1."
        )


def check_losses(values: Any, count: int, name: str) -> None:
    """Refuse the values of a loss or a measurement that are not one an example.

    Args:
        values: what the function returned.
        count: ``B``, how many examples it was given.
        name: what the function is called here.

    Raises:
        ValueError: saying what was got.
    """
    if isinstance(values, Tensor) and values.shape == (count,):
        return
    got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    raise ValueError(
        f"`{name}` returned {got}; accepted is one value an example, ({count},). A loss of torch takes the "
        f'mean unless it is given reduction="none": {name}=functools.partial(F.cross_entropy, '
        'reduction="none").'
    )


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        ValueError: naming both shapes.
    """
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_k(k: int, stored: int, how: str) -> None:
    """Refuse to rank more examples than are stored.

    Raises:
        ValueError: naming both numbers.
    """
    if not 1 <= k <= stored:
        raise ValueError(f"k={k}, but {stored} examples per query are stored ({how}); k is 1 to {stored}")


def read_indices(group: Any, every: Tensor) -> Tensor:
    """Read a group of training examples.

    Args:
        group: integers ``(n,)``, or a boolean mask over ``every``.
        every: ``(N,)`` the indices that there are.

    Returns:
        The group's indices ``(n,)``, as they were given.

    Raises:
        ValueError: if it is neither.
    """
    accepted = f"accepted are dataset indices (n,), or a boolean mask of shape ({len(every)},)"
    try:
        found = torch.as_tensor(group).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Got a group of type {type(group).__name__}; {accepted}.") from error
    if found.dtype == torch.bool and found.shape == every.shape:
        return every[found]
    integers = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.ndim != 1 or not (integers or found.numel() == 0):
        raise ValueError(f"Got a group of shape {tuple(found.shape)} and {found.dtype}; {accepted}.")
    return found.long()


def are_distinct(indices: Tensor) -> bool:
    """Return whether no index comes twice."""
    return not bool((indices.sort().values.diff() == 0).any())


def list_some(indices: Tensor) -> str:
    """Return the first indices as text, and how many more there are."""
    shown = ", ".join(map(str, indices[:10].tolist()))
    return shown if len(indices) <= 10 else f"{shown} and {len(indices) - 10} more"


def check_callable(name: str, value: object) -> None:
    """Refuse what cannot be called, as a loss has to be.

    Args:
        name: of the argument.
        value: what was given; None is accepted.

    Raises:
        TypeError: saying what was got and what is accepted.
    """
    if value is not None and not callable(value):
        raise TypeError(
            f"Got {name}={value!r}; accepted is a callable (module, batch) that returns the losses of the "
            "examples (B,) or the loss of the batch, or None for the module's own."
        )
