"""Follows the examples through operations that add rows up by an index, as graph networks do."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.model.uses.places import Place, find_owners

_BY_ROWS = {"index_add", "index_reduce", "index_copy"}
_BY_ELEMENTS = {"scatter", "scatter_add", "scatter_reduce"}
#: Names of the operations, those in place included.
SCATTERS = {name + end for name in _BY_ROWS | _BY_ELEMENTS for end in ("", "_")}


def follow_scatter(
    name: str, dim: int, index: Tensor, parts: tuple[Tensor, Tensor], places: list[Place | None], count: int
) -> Place | None:
    """Find the examples in the output of an operation that scatters rows.

    Args:
        name: of the operation.
        dim: the dimension in which rows are scattered.
        index: where they go.
        parts: what they are put into, and the rows.
        places: where the examples stand in these.
        count: number of examples ``B``.

    Returns:
        The place in the output; None if rows of several examples meet.
    """
    before, owners = (spread(place, tensor, count) for place, tensor in zip(places, parts, strict=True))
    if name.rstrip("_") in _BY_ROWS:
        shape = [1] * owners.ndim
        shape[dim] = -1
        index = index.view(shape).expand_as(owners)
    else:
        owners = owners[tuple(slice(size) for size in index.shape)]
    # Nobody's elements do not count: the largest and smallest owner of those that meet have to be one.
    last = before.scatter_reduce(dim, index, owners, "amax")
    first = _replace_nobody(before, count).scatter_reduce(dim, index, _replace_nobody(owners, count), "amin")
    return None if bool(((last >= 0) & (last != first)).any()) else find_owners(last, count)


def spread(place: Place | None, tensor: Tensor, num_examples: int) -> Tensor:
    """Return the owner of each element, -1 for those of nobody."""
    if place is None:
        return torch.full(tensor.shape, -1, device=tensor.device)
    if place.dim is None:
        assert place.owners is not None
        return torch.full(tensor.shape, place.owners[0], device=tensor.device)
    owners = place.owner_vector(num_examples).to(tensor.device)
    shape = [-1 if dim == place.dim else 1 for dim in range(tensor.ndim)]
    return owners.view(shape).expand(tensor.shape).contiguous()


def _replace_nobody(owners: Tensor, num_examples: int) -> Tensor:
    return torch.where(owners < 0, num_examples, owners)
