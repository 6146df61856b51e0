"""Follows the examples through recurrent networks and packed sequences.

Packed rows stand in the order of their lengths. Fused recurrent networks are not run on tensors without data,
which some builds of torch do not survive.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.model.uses.calls import Call, Slot, outputs_of
from lightning_influence.model.uses.places import Place, find_owners, from_owners

#: Names of the fused recurrent networks.
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def follow_sequences(
    call: Call, places: Mapping[Slot, Place], num_examples: int
) -> tuple[list[Place | None], dict[Slot, Place]] | None:
    """Find the examples in the outputs of packing, unpacking and of a fused recurrent network.

    Args:
        call: any call.
        places: where the examples stand in its tensors.
        num_examples: ``B``.

    Returns:
        The places in the outputs, and in states that came without one; None if the call is of another kind.
    """
    place, args = places.get((0, 0)), call.args
    if call.name == "embedding_bag":
        return _follow_bags(call, place, num_examples)
    if place is None or place.dim is None:
        return None
    if call.name == "_pack_padded_sequence":
        data, *rest = args
        owners = _spread(place, data.shape[:2], num_examples).unsqueeze(-1)
        return [find_owners(outputs_of(call.func(owners, *rest))[0][:, 0], num_examples), None], {}
    if call.name == "_pad_packed_sequence":
        owners = _spread(place, args[0].shape[:1], num_examples).unsqueeze(-1)
        padded = outputs_of(call.func(owners, args[1], args[2], -1, *args[4:]))[0]
        return [find_owners(padded[..., 0], num_examples), None], {}
    if call.name not in RECURRENT or len(args) != 9:
        return None
    if isinstance(args[1], Tensor) and args[0].ndim == 2:
        order = place.owner_vector(num_examples)
        rows = Place(0, owners=tuple(order.tolist()))
        states, first = Place(1, owners=tuple(order[: int(args[1][0])].tolist())), 2
    else:
        rows, states, first = place, place.moved(1), 1
        if place.dim != (0 if args[8] else 1):  # the batch was taken for the time
            return [None] * (3 if call.name == "lstm" else 2), {}
    slots: list[Slot] = [(0, first, 0), (0, first, 1)] if call.name == "lstm" else [(0, first)]
    found: list[Place | None] = [rows, states, states] if call.name == "lstm" else [rows, states]
    return found, {slot: states for slot in slots if slot not in places}


def _follow_bags(
    call: Call, place: Place | None, num_examples: int
) -> tuple[list[Place | None], dict[Slot, Place]] | None:
    """Return the place of each bag: that of the first of its rows; None if rows and bags are not apart."""
    offsets = call.get(2, "offsets")[1]
    if place is None or place.dim is None or offsets is None:
        return None
    owners = place.owner_vector(num_examples)
    starts = offsets[: len(offsets) - bool(call.get(9, "include_last_offset", False)[1])].cpu()
    bags = owners[starts.clamp(max=len(owners) - 1)]  # an empty bag at the end has nobody's gradient anyway
    return [from_owners(0, bags.tolist(), num_examples)], {}


def _spread(place: Place, shape: torch.Size, num_examples: int) -> Tensor:
    """Return the owners of the elements of a tensor of this shape."""
    assert place.dim is not None
    owners = place.owner_vector(num_examples)
    return (
        owners.view([-1 if dim == place.dim else 1 for dim in range(len(shape))]).expand(shape).contiguous()
    )
