"""Checks of arguments that several entry points take: indices, seeds, counts, subsets, losses' values."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.results.base import as_indices


def example_indices(examples: Any, count: int) -> list[int]:
    """Read a choice of training examples.

    Args:
        examples: integers, or a boolean mask over all examples.
        count: ``N``, how many there are.

    Returns:
        The indices, as they were given.

    Raises:
        ValueError: if it is neither, empty, or an index is out of range.
    """
    chosen: list[int] = as_indices(examples, torch.arange(count)).tolist()
    if not chosen or not all(0 <= index < count for index in chosen):
        raise ValueError(
            f"examples must be indices of the {count} training examples, got {chosen[:8]}: accepted are 0 to "
            f"{count - 1}, one or more, or a boolean mask over the examples that is true somewhere."
        )
    return chosen


def integers(values: Any) -> list[int] | None:
    """Return a sequence, a tensor or an array of integers as a list, None for anything else."""
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        return None
    try:
        return None if any(isinstance(value, bool) for value in values) else [*map(operator.index, values)]
    except TypeError:
        return None


def seed_list(seeds: Any) -> list[int]:
    """Read the seeds of a retraining.

    Args:
        seeds: a sequence, a tensor or an array.

    Returns:
        The seeds.

    Raises:
        ValueError: if they are no integers, none, or not all different.
    """
    found = integers(seeds)
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
    if not isinstance(values, Tensor) or values.shape != (count,):
        raise ValueError(_not_per_example(values, name, f"one value an example, ({count},)"))


def check_measured(values: Any, count: int) -> None:
    """Refuse measured values that are not one, or several, an example.

    Args:
        values: what the measurement returned.
        count: ``Q``, how many queries it was given.

    Raises:
        ValueError: saying what was got.
    """
    vector = isinstance(values, Tensor) and values.ndim == 1 and len(values) > 0
    if not vector or len(values) % count:
        accepted = f"one value a query, ({count},), or several: all queries' first, all queries' second"
        raise ValueError(_not_per_example(values, "measurement", accepted))


def _not_per_example(values: Any, name: str, accepted: str) -> str:
    got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    return (
        f"`{name}` returned {got}; accepted is {accepted}. A loss of torch takes the mean unless it is given "
        f'reduction="none": {name}=functools.partial(F.cross_entropy, reduction="none").'
    )
