"""Follows the examples through operations that add rows up by an index, as graph networks do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.model.uses.calls import Call, Slot
from lightning_influence.model.uses.places import Place, find_owners

_BY_ROWS = {"index_add", "index_reduce", "index_copy"}
_BY_ELEMENTS = {"scatter", "scatter_add", "scatter_reduce"}
#: Names of the operations, those in place included.
SCATTERS = {name + end for name in _BY_ROWS | _BY_ELEMENTS for end in ("", "_")}


def follow_scatter(call: Call, places: Mapping[Slot, Place], num_examples: int) -> list[Place | None] | None:
    """Find the examples in the output of an operation that scatters rows.

    Args:
        call: any call.
        places: where the examples stand in its tensors.
        num_examples: ``B``.

    Returns:
        The place in the output, None in it if rows of several examples meet; None if the call is of another
        kind.
    """
    if call.name not in SCATTERS:
        return None
    target, dim, index = call.get(0, "input")[1], call.get(1, "dim")[1], call.get(2, "index")[1]
    slot, source = call.get(3, "src" if "src" in call.kwargs else "source")
    first = (0, 0) if call.args else (1, "input")
    if not (isinstance(target, Tensor) and isinstance(source, Tensor) and isinstance(dim, int)):
        return [None]
    owners = _spread(places.get(slot), source, num_examples)
    before = _spread(places.get(first), target, num_examples)
    if call.name.rstrip("_") in _BY_ROWS:
        shape = [1] * source.ndim
        shape[dim] = -1
        index = index.view(shape).expand_as(source)
    else:
        owners = owners[tuple(slice(size) for size in index.shape)]
    # Nobody's elements do not count: the largest and smallest owner of those that meet have to be one.
    last = before.scatter_reduce(dim, index, owners, "amax")
    first_owner = _replace_nobody(before, num_examples).scatter_reduce(
        dim, index, _replace_nobody(owners, num_examples), "amin"
    )
    if bool(((last >= 0) & (last != first_owner)).any()):
        return [None]
    return [find_owners(last, num_examples)]


def _spread(place: Place | None, tensor: Tensor, num_examples: int) -> Tensor:
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
