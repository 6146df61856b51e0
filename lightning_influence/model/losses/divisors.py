"""What a batch's loss divides the sum of its values by, read from its autograd graph.

``values.mean()``, ``values.sum() / len(x)`` and ``(values * mask).sum() / mask.sum()`` are means: their
divisors, added up over the batches, are what the loss of the whole data set divides by. Half of
``values.sum()`` is a sum. One batch's derivatives do not tell these apart: half a sum of two values is a
mean, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import isclose, prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divisor:
    """What a batch's loss divides by.

    Attributes:
        value: positive.
        is_count: whether it is made of numbers of examples and values, whatever these are, and not of what
            the batch holds, such as the sum of a mask.
    """

    value: float
    is_count: bool


def find_factor(root: Any, call: Any) -> float | None:
    """Return what a loss multiplies the single value of a call with, if plain numbers are all that it does.

    Args:
        root: autograd node of the loss.
        call: autograd node of the value.

    Returns:
        The factor; None where something else stands between the two, or a number that is not on the CPU:
        derivatives tell, then.
    """
    factor, node = 1.0, root
    while node is not call:
        name, following = type(node).__name__, [edge[0] for edge in node.next_functions]
        if following[1:] != [None] or not name.startswith(("DivBackward", "MulBackward")):
            return None
        other = node._saved_other
        if other.dim() or not other.is_cpu:
            return None
        factor = factor / float(other) if name.startswith("Div") else factor * float(other)
        node = following[0]
    return factor


def find_divisor(
    root: Any,
    call: Any,
    calls: Collection[Any],
    counts: Callable[[], Collection[float]],
    host: float,
) -> Divisor | None:
    """Return what stands between a loss and the values of a call that it is made of.

    Args:
        root: autograd node of the loss.
        call: autograd node of the values.
        calls: nodes of all calls, beyond which not to look.
        counts: returns those of examples, rows, values, values that count, or their weight: plain numbers
            that make up none of them, together with the means, are factors, not divisors that go with the
            batch.
        host: what the host has divided the loss by after the user; its own division, the last one, counts
            not.

    Returns:
        The product of all divisors; None where the values are summed only.
    """
    averaged = plain = held = 1.0
    is_count = True
    for node in _path(root, call, calls):
        name = type(node).__name__
        if name.startswith("MeanBackward"):
            averaged *= _averaged(node)
        elif name.startswith("DivBackward") and host != 1:
            host = 1.0
        elif name.startswith("DivBackward") and not node._saved_other.dim():
            value, is_plain = float(node._saved_other), _is_plain_number(node._saved_other)
            plain, held = (plain * value, held) if is_plain else (plain, held * value)
            is_count &= is_plain
    if is_count and plain != 1 and any(isclose(averaged * plain, n, rel_tol=1e-4) for n in counts()):
        averaged *= plain
    whole = averaged * held
    return Divisor(whole, is_count) if whole > 0 and (whole != 1 or not is_count) else None


def _path(root: Any, end: Any, stops: Collection[Any]) -> list[Any]:
    """Return the nodes from one to another, both left out but for the first, by a shortest way."""
    parents: dict[Any, Any] = {root: None}
    todo = [root]
    for node in todo:
        if node is end:
            break
        if node in stops:
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in parents:
                parents[following] = node
                todo.append(following)
    found = []
    node = parents.get(end)
    while node is not None:
        found.append(node)
        node = parents[node]
    return found[::-1]


def _averaged(node: Any) -> int:
    """Return how many values a mean is over, in all dimensions or in some."""
    sizes = _saved(node, "_saved_self_sym_sizes", "_saved_self_sizes")
    dims = getattr(node, "_saved_dim", None)
    if dims is None or not len(dims):
        return prod(sizes)
    return prod(sizes[dim if dim < len(sizes) else dim - 2**64] for dim in dims)


def _saved(node: Any, *names: str) -> Any:
    return next(getattr(node, name) for name in names if hasattr(node, name))


def _is_plain_number(other: Tensor) -> bool:
    """Return whether it was one of Python's: only a tensor's precision counts beside a tensor's."""
    low = torch.zeros((), dtype=torch.float16 if other.is_floating_point() else torch.int8)
    return torch.result_type(other, low) == low.dtype
