"""What the training data are: losses and content of the examples that a pass has seen.

Each example has a digest of its index, of what the batch holds of it and of the loss's settings; their sum is
the same whatever batches the examples come in and whatever processes see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.captured import Captured, LossSum
from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.model.losses.ragged import RaggedLoss
from lightning_influence.support.batches import MOST_DEPTH, open_part
from lightning_influence.support.digests import digest_number, digest_rows
from lightning_influence.support.random_states import combine_keys
from lightning_influence.support.waiting import LaterSum

_PLAIN = (str, bytes, int, float, bool, type(None))
# Settings of a loss that are tensors; others hold values of the examples, which the batch tells.
_SETTINGS = {"class_weights", "pos_weight"}

# Means that differ by less are taken for equal: batches of another size round differently.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-7
_RELATIVE_HALF = 1e-2


class SeenData(LossSum):
    """The sum of the losses, and of digests of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self._sum: Tensor | None = None  # int64, which wraps around as the sum is meant to
        self._examples: Tensor | None = None

    @property
    def content(self) -> int:
        """Sum of the digests, modulo ``2**64``; 0 before there are any."""
        return 0 if self._sum is None else int(self._sum)

    def read(self, batch: Any, indices: Tensor) -> None:
        """Read a batch, before a step may write to it; :meth:`add` counts it.

        Args:
            batch: as the step gets it.
            indices: dataset indices of its examples, ``(B,)``.
        """
        self._examples = digest_examples(batch, indices)

    def add(self, captured: Captured) -> None:
        """Add the batch that was read."""
        super().add(captured)
        if self._examples is not None:
            settings = 0 if captured.loss is None else digest_number(_describe(captured.loss))
            digests = combine_keys(self._examples ^ settings, 0)
            total = digests.sum()
            self._sum = total if self._sum is None else self._sum + total.to(self._sum.device)
            self._examples = None

    def numbers(self) -> list[float | int]:
        """Return all that was counted, for :meth:`restore`."""
        return [self.total, self.examples, self.weight, self.content]

    def restore(self, numbers: Sequence[float | int]) -> None:
        """Go on from what :meth:`numbers` of another object returned."""
        total, self.examples, weight, content = numbers[0], int(numbers[1]), numbers[2], int(numbers[3])
        self._total, self._weight, self._sum = LaterSum(total), LaterSum(weight), torch.tensor(content)

    def identify(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> int:
        """Return the digest of the examples of all processes, given what sums over these."""
        return _wrap(int(all_reduce_sum(torch.tensor([self.content]))[0]))


def digest_examples(batch: Any, indices: Tensor) -> Tensor:
    """Return digests of the examples of a batch, by their index and what the batch holds of them.

    Args:
        batch: tensors, numbers and texts in any nesting. A part that cannot be split among the examples
            counts as the first one's.
        indices: dataset indices ``(B,)``.

    Returns:
        ``(B,)`` int64, on the device of the batch's first tensor.
    """
    count = len(indices)
    parts = list(_parts(batch, MOST_DEPTH))
    device = next((part.device for part in parts if not part.is_cpu), indices.device)
    total = combine_keys(indices.to(device, non_blocking=True), 0)
    for number, part in enumerate(parts):
        rows = part.transpose(0, 1) if part.ndim > 1 and part.shape[0] != count == part.shape[1] else part
        if rows.ndim and len(rows) and len(rows) % count == 0:
            found = digest_rows(rows.reshape(count, -1))
        else:
            first = digest_rows(rows.reshape(1, -1))
            found = torch.cat([first, first.new_zeros(count - 1)])
        total = total + combine_keys(found.to(device, non_blocking=True), number + 1)
    return total


def _parts(item: Any, depth: int) -> Iterator[Tensor]:
    """Yield the tensors of a batch, and tensors of digests of what is plain."""
    if isinstance(item, Tensor):
        if item.layout == torch.strided:
            yield item
    elif isinstance(item, _PLAIN):
        yield torch.tensor(digest_number(item))
    elif isinstance(item, list | tuple) and item and all(isinstance(part, _PLAIN) for part in item):
        yield torch.tensor([digest_number(part) for part in item])
    else:
        opened = open_part(item) if depth else None
        for part in opened.parts if opened is not None else ():
            yield from _parts(part, depth - 1)


def _describe(loss: OutputLoss) -> tuple[Any, ...]:
    """Return the settings of a loss: no value of a batch, and no factor that may depend on its size."""
    if isinstance(loss, RaggedLoss):  # as which rows may be read that are as many of each example elsewhere
        return _describe(replace(loss.rows, reduction=loss.reduction))
    told: list[Any] = [type(loss).__name__]
    for part in fields(loss):
        value = getattr(loss, part.name)
        if isinstance(value, OutputLoss):
            told.append(_describe(value))
        elif isinstance(value, tuple):
            told += [_describe(term) for term in value if isinstance(term, OutputLoss)]
        elif isinstance(value, Tensor) and part.name in _SETTINGS:
            told.append(int(digest_rows(value.reshape(1, -1))))
        elif isinstance(value, _PLAIN) and part.name not in ("num_examples", "factor"):
            told.append(value)
    return tuple(told)


def _wrap(number: int) -> int:
    """Return an integer modulo ``2**64``, with a sign."""
    return (number + 2**63) % 2**64 - 2**63


def same_mean(one: float, other: float, dtype: torch.dtype) -> bool:
    """Return whether two mean losses agree, up to the rounding of a model in this precision."""
    relative = _RELATIVE_HALF if dtype in (torch.float16, torch.bfloat16) else _RELATIVE
    return abs(one - other) <= relative * max(abs(one), abs(other)) + _ABSOLUTE
