"""Which rows a step picked by a mask, so that they are no longer as many for each example.

``logits[mask]`` of two sequences of 4 and 2 positions has as many rows as that of two of 3: their number does
not say whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SELECT = (torch.masked_select, torch.Tensor.masked_select)
#: Functions that may pick rows by a mask.
PICKERS = frozenset({torch.Tensor.__getitem__, *_SELECT})


def count_picked(function: Callable[..., Any], args: Sequence[Any], result: Any) -> int | None:
    """Return how many rows a call of a torch function picked by a mask; None for every other call."""
    if function not in PICKERS or not isinstance(result, Tensor) or not result.dim():
        return None
    if function in _SELECT:
        return len(result)
    if len(args) < 2:
        return None
    index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
    return len(result) if isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() else None


class PickedRows(TorchFunctionMode):
    """Context manager that notes the numbers of rows that masks leave, in :attr:`counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: set[int] = set()

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
        if func in PICKERS and not torch.compiler.is_compiling():
            count = count_picked(func, args, result)
            self.counts |= set() if count is None else {count}
        return result
