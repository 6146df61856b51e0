"""Whose rows are, by their number: those that a step picked are no longer as many for each example.

``logits[mask]`` of two sequences of 4 and 2 positions has as many rows as that of two of 3: their number does
not say whose they are. It does where they are all the positions that the examples are known to have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.model.losses.way import Way
from lightning_influence.support.batches import find_tensors

_SELECT = (torch.masked_select, torch.Tensor.masked_select)
# Places where something holds: as many rows will be picked by them.
_PLACES = (torch.nonzero, torch.Tensor.nonzero, torch.argwhere, torch.Tensor.argwhere)
#: Functions that may pick rows by a mask.
PICKERS = frozenset({torch.Tensor.__getitem__, torch.where, *_SELECT, *_PLACES})


def count_picked(function: Callable[..., Any], args: Sequence[Any], result: Any) -> int | None:
    """Return how many rows a call of a torch function picked by a mask; None for every other call."""
    if function not in PICKERS:
        return None
    if function in _PLACES or (function is torch.where and isinstance(result, tuple)):
        return len(result[0]) if isinstance(result, tuple) else len(result)
    if function is torch.where or not isinstance(result, Tensor) or not result.dim():
        return None
    if function in _SELECT:
        return len(result)
    if len(args) < 2:
        return None
    index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
    return len(result) if isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() else None


class PickedRows(TorchFunctionMode):
    """Context manager that notes the numbers of rows that masks leave.

    Attributes:
        counts: these numbers.
        way: which functions were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: set[int] = set()
        self.way = Way()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function, and note what it picked.

        Returns:
            What the function returns.
        """
        result = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling():
            self.way.note(func)
        if func in PICKERS and not torch.compiler.is_compiling():
            count = count_picked(func, args, result)
            self.counts |= set() if count is None else {count}
        return result


class WholeRows:
    """Numbers of rows that are all positions of the examples of a batch.

    Args:
        batch: any nesting.
        num_examples: ``B``.
        positions: how many the outputs of layers have of each example.
        left_out: how many of its positions may be missing, as the last one of shifted targets is.
    """

    def __init__(
        self, batch: Any, num_examples: int, positions: Iterable[int], left_out: Iterable[int] = ()
    ) -> None:
        self._count, self._left_out = num_examples, {0, *left_out}
        self._positions = set(positions)
        tensors = [tensor for tensor in find_tensors(batch) if tensor.dim()]
        for shape, is_index in ((tensor.shape, not tensor.is_floating_point()) for tensor in tensors):
            if shape[0] == num_examples:
                ends = range(2, len(shape) + is_index)
                self._positions |= {math.prod(shape[1:end]) for end in ends}
        # Of examples that are single rows there are more rows only where they are repeated.
        self._is_flat = self._positions <= {1} and all(len(tensor) == num_examples for tensor in tensors)

    def __contains__(self, rows: object) -> bool:
        """Return whether so many rows are ``B``, or all positions of each example."""
        if not isinstance(rows, int) or rows % self._count:
            return False
        each = rows // self._count
        known = bool(self.left_out(rows) & self._left_out)
        return self._count == 1 or each == 1 or known or self._is_flat

    def are_of_one(self, rows: int) -> bool:
        """Return whether so many rows are all positions of the only example."""
        return self._count == 1 and (rows == 1 or rows in self._positions)

    def left_out(self, rows: int) -> set[int]:
        """Return how many positions of each example may be missing in so many rows."""
        each = rows // self._count
        return {positions - each for positions in self._positions if positions >= each}
