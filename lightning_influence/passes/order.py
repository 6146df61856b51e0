"""Whether a step's losses come in the order in which the examples stand in the batch.

The rows of a loss tell nothing of the examples they are about: after ``(T, B, C)`` is flattened, or sequences
are sorted or packed, every row is taken for another example's, and no gradient shows it. What does show it is
the batch in another order, whose losses must come in that order: in reverse, and shifted by one, since copies
of the batch behind one another look alike in reverse.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_influence.errors import InfluenceWarning, UnsupportedModelError
from lightning_influence.host.random_states import preserved_rng

_RANDOM = (
    "The losses of one and the same batch differ from call to call: `training_step` draws noise or mixes "
    "examples in eval mode too, or keeps a state. The scores are those of one draw. Define "
    "`influence_loss(batch) -> (B,)` on the module without it, if it is not what you want to explain."
)

_ORDER = (
    "The losses do not come in the order of the batch's examples: when the examples change places, they do "
    "not. Accepted are losses whose rows are the examples, in their order. Before the loss, bring "
    "time-first outputs (T, B, C) into the form (B, T, C), and undo the sorting or packing of sequences; "
    "several views of an example have to stand together (`x.repeat_interleave(2, 0)`, not `cat([x, x])`); or "
    "define `influence_loss(batch) -> (B,)` on the module. Batches that are time-first themselves need a "
    "batch size that is not the number of time steps."
)


def check_order(values: Tensor, batch: Any, losses: Callable[[Any, int], Tensor], dtype: torch.dtype) -> None:
    """Check that a batch in another order has its losses in that order.

    Nothing is concluded where that cannot be told: batches of unknown parts, steps that fail on a reordered
    batch (as packing sorted sequences does), and losses that change from call to call, which are warned of.

    Args:
        values: the loss of each example, ``(B,)``.
        batch: the batch they are of.
        losses: maps a batch and its number of examples to their losses.
        dtype: precision of the model's outputs.

    Raises:
        UnsupportedModelError: if the losses come in another order.
    """
    values, count = values.detach(), len(values)
    limit = (1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4) * values.abs().max()

    def same(others: Tensor | None, order: list[int]) -> bool:
        return others is not None and bool(((others - values[order]).abs() <= limit).all())

    with preserved_rng():
        for order in _orders(values, limit):
            other = _try(losses, _try(rearranged, batch, order, count), len(order))
            if other is None or same(other, order):
                continue
            if not same(_try(losses, batch, count), list(range(count))):
                warnings.warn(_RANDOM, InfluenceWarning, stacklevel=2)
                return
            raise UnsupportedModelError(_ORDER)


def _orders(values: Tensor, limit: Tensor) -> list[list[int]]:
    """Return the orders to try; the first example alone where no order would show anything."""
    count = len(values)
    if count == 2 or bool(values.max() - values.min() <= limit):
        return [list(range(count))[::-1], [0]]
    return [list(range(count))[::-1], [count - 1, *range(count - 1)]]


def missing_positions(batch: Any, count: int, rows: int) -> int:
    """Return how many positions of an example the loss leaves out.

    A loss on padded sequences leaves out the same number in every batch (none, or one where targets are
    shifted). On sequences without their padding the number changes with the lengths, and only batches of
    equal lengths have rows that can be told apart.

    Args:
        batch: the batch.
        count: number of examples ``B``.
        rows: number of rows of the loss.

    Returns:
        Width of the widest tensor ``(B, T, ...)`` in the batch less the rows of an example; 0 for one row an
        example.
    """
    widths = [part.shape[1] for part in _tensors(batch) if part.ndim > 1 and len(part) == count]
    return 0 if rows == count else max(widths, default=0) - rows // count


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Mapping | list | tuple):
        for item in part.values() if isinstance(part, Mapping) else part:
            yield from _tensors(item)


class UnknownPartError(Exception):
    """A part of a batch of which it is not known how it belongs to the examples."""


def rearranged(part: Any, order: Sequence[int], count: int) -> Any:
    """Return a copy of a batch, or of a part of one, with its examples in another order.

    Args:
        part: tensors of ``count`` rows, or else of ``count`` columns (time-first ones), numbers and texts,
            in any nesting of lists, tuples and mappings; a list of one thing an example is rearranged itself.
        order: positions of the examples; may be fewer than there are.
        count: number of examples ``B``.

    Returns:
        The rearranged part.

    Raises:
        UnknownPartError: if there is anything else in it.
    """
    if isinstance(part, Tensor):
        return _rearranged_tensor(part, order, count)
    if part is None or isinstance(part, str | bytes | int | float):
        return part
    if isinstance(part, Mapping):
        result: Any = copy.copy(part)
        for key, value in part.items():
            result[key] = rearranged(value, order, count)
        return result
    if isinstance(part, list | tuple) and not isinstance(part, PackedSequence):
        return _rearranged_items(part, order, count)
    raise UnknownPartError


def _rearranged_tensor(part: Tensor, order: Sequence[int], count: int) -> Tensor:
    if part.layout != torch.strided:
        raise UnknownPartError
    for dim in (0, 1):
        if part.ndim > dim and part.shape[dim] == count:
            return part.index_select(dim, torch.tensor(order, device=part.device))
    if part.ndim:
        raise UnknownPartError
    return part


def _rearranged_items(part: Any, order: Sequence[int], count: int) -> Any:
    plain = all(item is None or isinstance(item, str | bytes | int | float) for item in part)
    try:
        items = list(part) if plain else [rearranged(item, order, count) for item in part]
    except UnknownPartError:
        plain, items = True, list(part)
        if len(items) != count:
            raise
    if plain and len(items) == count:
        items = [items[position] for position in order]
    return type(part)(*items) if hasattr(part, "_fields") else type(part)(items)


def _try(function: Callable[..., Any], argument: Any, *more: Any) -> Any:
    """Return what the function returns, None if it fails or has no argument."""
    if argument is None:
        return None
    try:
        return function(argument, *more)
    except Exception:  # whatever the user's code may raise
        return None
