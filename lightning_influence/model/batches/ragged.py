"""Rows of a batch that belong to its examples by an index: graphs, flat sequences, packed sequences.

Graphs of different sizes are batched by joining their nodes and edges. Which rows are whose is told by
tensors of the batch: an index with the example of each row, offsets between the examples, the number of rows
of each, or pairs of rows (edges), each within one example. All are recognised by their values, whatever they
are called: ascending numbers with each example among them, and pairs that never join two examples, are not
met by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_influence.model.uses.places import Place, from_owners
from lightning_influence.support.batches import find_packed, find_tensors


@dataclass(frozen=True)
class Rows:
    """How the rows of one tensor belong to the examples.

    Attributes:
        dim: the dimension in which they stand.
        owners: the example of each, ``(R,)``, on the CPU.
        counts: what the tensor's values number: ``"examples"``, the first rows of examples (``"starts"``, or
            ``"offsets"`` where the number of rows follows), rows of the tensors with as many as this number
            says, or None for values that are data.
    """

    dim: int
    owners: Tensor
    counts: str | int | None = None


@dataclass
class _Search:
    count: int
    owners: dict[int, Tensor] = field(default_factory=dict)  # by number of rows
    found: dict[int, Rows] = field(default_factory=dict)  # by number of the tensor


def find_rows(tensors: Sequence[Tensor], count: int) -> dict[int, Rows]:
    """Find the tensors of a batch whose rows belong to the examples by an index.

    Args:
        tensors: of the batch.
        count: number of examples ``B``.

    Returns:
        How they do, by position among the tensors; empty for a batch without an index, or of one example.
    """
    search, whole = _Search(count), {n: t for n, t in enumerate(tensors) if _is_index(t)}
    if count < 2 or all(t.ndim == 0 or count in t.shape[:2] for t in tensors):
        return {}
    flat = {n: t.detach().cpu().long() for n, t in whole.items()}
    for number, values in flat.items():
        if values.ndim == 1 and len(values) > count and _is_ascending(values, count):
            search.owners.setdefault(len(values), values)
            search.found[number] = Rows(0, search.owners[len(values)], "examples")
    # Class weights and positions are vectors, masks square: labels that sum to their size are no index.
    flats = [
        t
        for n, t in enumerate(tensors)
        if (t.ndim == 1 and n in flat and not _are_positions(flat[n]))
        or (t.ndim > 1 and t.shape[0] != t.shape[1])
    ]
    lengths = {len(t) for t in flats} - {count, count + 1}
    for number, values in flat.items():
        counts, steps = _read_steps(values, count, lengths)
        if steps is None or int(steps.sum()) not in lengths:
            continue
        owners = torch.arange(count).repeat_interleave(steps)
        search.owners.setdefault(len(owners), owners)
        if counts is not None:
            search.found[number] = Rows(0, owners, counts)
    if search.owners:
        _add_edges(search, flat)
        _add_others(search, tensors, flat)
    return search.found


def find_places(batch: Any, count: int) -> dict[Tensor, Place]:
    """Return where the examples stand in the tensors of a batch that hold them by an index.

    Args:
        batch: any nesting.
        count: number of examples ``B``.
    """
    tensors = find_tensors(batch)
    rows = find_rows(tensors, count)
    places = {
        tensors[number]: from_owners(some.dim, some.owners.tolist(), count)
        for number, some in rows.items()
        if some.counts not in ("offsets", "starts")
    }
    for packed in find_packed(batch):
        owners = find_packed_owners(packed, count)
        if owners is not None and count > 1:
            places[packed.data] = from_owners(0, owners.tolist(), count)
    return places


def find_packed_owners(packed: PackedSequence, count: int) -> Tensor | None:
    """Return the example of each row of a packed sequence, ``(R,)``; None if it is of other examples."""
    sizes = packed.batch_sizes.tolist()
    if not sizes or sizes[0] != count:
        return None
    order = packed.sorted_indices
    order = torch.arange(count) if order is None else order.cpu()
    return torch.cat([order[:size] for size in sizes])


def select_rows(tensor: Tensor, rows: Rows, order: Sequence[int], owners: Mapping[int, Tensor]) -> Tensor:
    """Return the rows of some examples in their order, numbers of rows and examples counted anew.

    Args:
        tensor: one of those that were found.
        rows: how its rows belong to the examples.
        order: positions of the examples.
        owners: the example of each row, by number of rows.
    """
    if rows.counts in ("offsets", "starts"):
        steps = torch.bincount(rows.owners, minlength=max(order) + 1)[list(order)]
        offsets = torch.cat([steps.new_zeros(1), steps.cumsum(0)]).to(tensor)
        return offsets if rows.counts == "offsets" else offsets[:-1]
    kept = _order_rows(rows.owners, order)
    result = tensor.index_select(rows.dim, kept.to(tensor.device))
    if rows.counts == "examples":
        places = torch.zeros(max(order) + 1, dtype=torch.long)
        places[list(order)] = torch.arange(len(order))
        return places[rows.owners[kept]].to(tensor)
    if isinstance(rows.counts, int):
        targets = _order_rows(owners[rows.counts], order)
        places = torch.zeros(rows.counts, dtype=torch.long)
        places[targets] = torch.arange(len(targets))
        return places[result.cpu().long()].to(tensor)
    return result


def _order_rows(owners: Tensor, order: Sequence[int]) -> Tensor:
    return torch.cat([(owners == example).nonzero().flatten() for example in order])


def _is_index(tensor: Tensor) -> bool:
    integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return tensor.layout == torch.strided and integer and tensor.ndim in (1, 2) and tensor.numel() > 0


def _are_positions(values: Tensor) -> bool:
    """Return whether a vector is 0, 1, 2 and so on, which says nothing of examples."""
    return torch.equal(values, torch.arange(len(values)))


def _is_ascending(values: Tensor, count: int) -> bool:
    """Return whether values run from the first to the last example, each of them among them."""
    steps = values[1:] - values[:-1]
    ends = int(values[0]) == 0 and int(values[-1]) == count - 1
    return ends and bool(((steps == 0) | (steps == 1)).all())


def _read_steps(values: Tensor, count: int, lengths: set[int]) -> tuple[str | None, Tensor | None]:
    """Return whether values are offsets or starts, and the number of rows of each example, ``(B,)``."""
    if values.ndim != 1 or len(values) not in (count, count + 1):
        return None, None
    kind = None
    if int(values[0]) == 0:
        kind = "starts" if len(values) == count else "offsets"
        if kind == "starts":
            ends = [length for length in lengths if length > int(values[-1])]
            if len(ends) != 1:  # of which rows they are is not known
                return None, None
            values = torch.cat([values, values.new_tensor(ends)])
        values = values[1:] - values[:-1]
    elif len(values) != count:
        return None, None
    if not bool((values > 0).all()) or (kind == "starts" and bool((values[:-1] == 1).all())):
        return None, None  # numbers of examples are no starts
    return kind, values


def _add_edges(search: _Search, flat: Mapping[int, Tensor]) -> None:
    """Find pairs of rows, ``(2, E)`` or ``(E, 2)``, whose rows belong to the same example each."""
    for number, values in flat.items():
        if values.ndim != 2 or 2 not in values.shape or number in search.found:
            continue
        dim = 1 if values.shape[0] == 2 else 0
        for size, owners in list(search.owners.items()):
            if int(values.min()) < 0 or int(values.max()) >= size:
                continue
            first, second = owners[values].unbind(1 - dim)
            if bool((first == second).all()):
                search.owners.setdefault(len(first), first)
                search.found[number] = Rows(dim, first, size)
                break


def _add_others(search: _Search, tensors: Sequence[Tensor], flat: Mapping[int, Tensor]) -> None:
    """Give the other tensors with as many rows the same examples."""
    for number, tensor in enumerate(tensors):
        if number in search.found or not tensor.ndim or len(tensor) == search.count:
            continue
        owners = search.owners.get(len(tensor))
        if owners is not None:
            counts = _find_target(search, flat[number], owners) if number in flat else None
            search.found[number] = Rows(0, owners, counts)


def _find_target(search: _Search, values: Tensor, owners: Tensor) -> int | None:
    """Return of which rows integers are the numbers: those that belong to the same examples; or None."""
    if values.ndim != 1 or int(values.min()) < 0:
        return None
    for size, others in search.owners.items():
        if int(values.max()) < size and bool((others[values] == owners).all()):
            return size
    return None
