"""Follows the examples of a batch through any one operation.

No table says where an operation leaves its examples. It is run once more on tensors without data (of the
meta device), in which every dimension of examples is stretched by a factor: the output's dimension that is
stretched too is the one in which the examples stand, whatever other sizes happen to equal the batch's. Two
families need more, and are recognised by name: reshapes, whose sizes are written into their arguments, are
followed by the order of their elements, and operations that pick or repeat slices run on the examples'
numbers in place of the data, which then say themselves whose slice is whose.

A constant that has the batch's size (a first hidden state, a class token that was expanded) does not fit the
stretched tensors; the tensor, or the number among the arguments, that has to be stretched with them for the
operation to run is one that holds examples, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations

import torch
from torch import Tensor

from lightning_influence.model.uses.calls import Call, Slot, integers_of, outputs_of, tensors_of
from lightning_influence.model.uses.places import Place, find_owners, from_owners, reshape_place, whole
from lightning_influence.model.uses.scatters import SCATTERS, follow_scatter, spread

# Names of the fused recurrent networks, which are not run on tensors without data: some builds of torch do
# not survive it.
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}

#: Operations that keep all elements in row-major order.
RESHAPES = {
    "view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "view_as", "reshape_as",
    "contiguous", "_unsafe_view", "squeeze_", "unsqueeze_",
}  # fmt: skip
#: Operations that pick slices by an index or put them into another order.
PICKS = {
    "__getitem__", "index_select", "gather", "take_along_dim", "masked_select", "flip", "fliplr", "flipud",
    "roll", "rot90", "take",
}  # fmt: skip
#: Operations whose outputs consist of slices of their first argument, or of repetitions of these.
MOVES = PICKS | {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack", "column_stack",
    "repeat", "repeat_interleave", "tile", "expand", "chunk", "split", "split_with_sizes", "tensor_split",
    "unbind", "narrow", "select", "unfold", "expand_as", "broadcast_to", "hsplit", "vsplit", "dsplit",
}  # fmt: skip
# Operations with lengths or repetitions among their arguments.
_BY_VALUE = RECURRENT | SCATTERS | {
    "repeat_interleave", "_pack_padded_sequence", "_pad_packed_sequence", "embedding_bag",
}  # fmt: skip
# Operations that write into a part of a tensor: what they are called on, the part, what is written.
_ASSIGNMENTS = {"__setitem__", "index_put", "index_put_"}
_FACTORS = (3, 5, 7, 11, 13, 17)
# Tensors and numbers that are tried as holders of examples before the examples are given up.
_MOST_TRIALS = 200


@dataclass
class Followed:
    """Where the examples went.

    Attributes:
        outputs: the place in each output; None where examples are mixed or no place was found.
        promoted: further tensors that turned out to hold examples, by slot.
        literals: numbers among the arguments that count examples -> what they are for one example.
        dropped: slots whose tensors turned out to hold none.
    """

    outputs: list[Place | None]
    promoted: dict[Slot, Place] = field(default_factory=dict)
    literals: dict[Slot, int] = field(default_factory=dict)
    dropped: list[Slot] = field(default_factory=list)


@dataclass(frozen=True)
class Followable:
    """A call whose outputs are known, ready to be followed.

    Attributes:
        call: the call.
        places: where the examples stand in its tensors, by slot.
        before: the tensors' shapes when it ran.
        shapes: its outputs' shapes.
        num_examples: ``B``.
        fixed: slots of tensors that certainly hold no examples: parameters.
        doubtful: slots whose place is a guess.
    """

    call: Call
    places: Mapping[Slot, Place]
    before: Mapping[Slot, torch.Size]
    shapes: list[torch.Size]
    num_examples: int
    fixed: frozenset[Slot] = frozenset()
    doubtful: frozenset[Slot] = frozenset()


def is_data_dependent(call: Call) -> bool:
    """Return whether the examples' way through the call depends on values, so that it holds for once only."""
    if call.name in PICKS:
        tensors = list(tensors_of(call).values())
        return len(tensors) > 1 or any(isinstance(arg, list) for arg in call.args)
    if call.name in _ASSIGNMENTS:
        return any(slot[:2] == (0, 1) or slot[:2] == (1, "indices") for slot in tensors_of(call))
    return call.name in _BY_VALUE and len(tensors_of(call)) > 1


def follow(op: Followable) -> Followed:
    """Find the examples in the outputs of a call.

    Args:
        op: the call; some of its tensors hold examples.

    Returns:
        Their places.
    """
    lost: list[Place | None] = [None] * len(op.shapes)
    if op.num_examples == 1:
        return Followed([whole(0) for _ in op.shapes])
    if all(0 in shape for shape in op.shapes):  # rows of nobody
        return Followed([Place(shape.index(0), owners=()) for shape in op.shapes])
    with torch.no_grad(), torch._C.DisableTorchFunction():
        found = _follow_sequences(op.call, op.places, op.num_examples)
        if op.call.name in SCATTERS:
            return Followed([_follow_scatter(op)])
        if op.call.name in _ASSIGNMENTS:
            return _follow_assignment(op)
    if found is not None:
        return Followed(*found)
    kinds = set(op.places.values())
    if len(kinds) == 1 and next(iter(kinds)).dim is None and op.call.name not in ("cat", "stack"):
        return Followed([next(iter(kinds)) for _ in op.shapes])
    if any(place.dim is None for place in kinds):
        return Followed(_pick(op) or lost)
    return _reshape(op) or _search_or_pick(op) or Followed(lost)


def _follow_scatter(op: Followable) -> Place | None:
    """Return where the examples are after rows were added up by an index."""
    call = op.call
    slots = _first_slot(call), call.get(3, "src" if "src" in call.kwargs else "source")[0]
    tensors = tensors_of(call)
    target, source = (tensors.get(slot) for slot in slots)
    dim, index = call.get(1, "dim")[1], call.get(2, "index")[1]
    if target is None or source is None or not isinstance(dim, int):
        return None
    places = [op.places.get(slot) for slot in slots]
    return follow_scatter(call.name, dim, index, (target, source), places, op.num_examples)


def _follow_assignment(op: Followable) -> Followed:
    """Return where the examples are in a tensor after others were written into a part of it.

    What was made of parameters alone and fills that part has a row for each example, too.
    """
    call, tensors = op.call, tensors_of(op.call)
    part, slot = call.get(1, "indices")[1], call.get(2, "values")[0]
    target, value = tensors.get(_first_slot(call)), tensors.get(slot)
    if target is None or call.get(3, "accumulate", False)[1]:
        return Followed([None])
    part = tuple(part) if call.name != "__setitem__" else part
    owners = spread(op.places.get(_first_slot(call)), target, op.num_examples).clone()
    before, promoted = owners[part], None
    if value is not None and slot not in op.places and slot not in op.fixed and before.shape == value.shape:
        promoted = find_owners(before, op.num_examples)
    if promoted is None or promoted.dim is None:
        owners[part] = -1 if value is None else spread(op.places.get(slot), value, op.num_examples)
        return Followed([find_owners(owners, op.num_examples)])
    return Followed([find_owners(owners, op.num_examples)], promoted={slot: promoted})


def _reshape(op: Followable) -> Followed | None:
    """Return where a reshape leaves the examples; None if the call is none."""
    first = _first_slot(op.call)
    if op.call.name not in RESHAPES or first not in op.places or len(op.shapes) != 1:
        return None
    old, new = op.before[first], op.shapes[0]
    if old.numel() != new.numel():
        return None
    return Followed([reshape_place(op.places[first], old, new, op.num_examples)])


def _search_or_pick(op: Followable) -> Followed | None:
    """Return what stretching shows, or the examples' numbers where slices are picked or repeated."""
    name = op.call.name
    if is_data_dependent(op.call) or name in PICKS - {"__getitem__"}:
        picked = _pick(op)
        if picked is not None:
            return Followed(picked)
    followed = _search(op)
    if name in MOVES and (followed is None or any(place is None for place in followed.outputs)):
        picked = _pick(op)
        if picked is not None:
            return Followed(picked)
    return followed


def place_output(op: Followable, number: int, target: Place) -> Iterator[Followed]:
    """Find what has to hold examples for an output of a call without examples to hold them in a given place.

    Args:
        op: the call, without places.
        number: of the output.
        target: the place.

    Yields:
        Possible explanations, the simplest first.
    """
    for extra, literals in _promotions(op, {target}):
        followed = _stretch(op, extra, literals, [], _factor(op), target)
        if followed is not None and followed.outputs[number] == target:
            yield followed


def _search(op: Followable) -> Followed | None:
    """Return what stretching shows; if it does not run, stretch or let go of further arguments, too."""
    factor = _factor(op)
    plain = _stretch(op, {}, {}, [], factor)
    if plain is not None:
        return plain
    for slot in op.doubtful:
        followed = _stretch(op, {}, {}, [slot], factor)
        if followed is not None and any(place is not None for place in followed.outputs):
            return followed
    for extra, literals in _promotions(op, set(op.places.values())):
        followed = _stretch(op, extra, literals, [], factor)
        if followed is not None and any(place is not None for place in followed.outputs):
            return followed
    return None


def _promotions(op: Followable, kinds: set[Place]) -> Iterator[tuple[dict[Slot, Place], dict[Slot, int]]]:
    """Yield tensors and numbers that may hold as many examples as some places do, alone and in pairs."""
    B = op.num_examples
    singles: list[tuple[Slot, Place | int]] = []
    for slot, shape in op.before.items():
        if slot in op.places or slot in op.fixed:
            continue
        for dim, size in enumerate(shape):
            same = next((kind for kind in kinds if kind.size(B) == size), None)
            if same is not None:
                singles.append((slot, same.moved(dim)))
            elif size == B and any(kind.owners is None for kind in kinds):
                singles.append((slot, Place(dim)))
    for slot, value in integers_of(op.call).items():
        if value > 0 and value % B == 0 and any(kind.size(B) % value == 0 for kind in kinds):
            singles.append((slot, value // B))
    pairs = ((a, b) for a, b in combinations(singles, 2) if a[0] != b[0])
    trials = chain(((single,) for single in singles), pairs)
    for _, some in zip(range(_MOST_TRIALS), trials, strict=False):
        yield (
            {slot: value for slot, value in some if isinstance(value, Place)},
            {slot: value for slot, value in some if not isinstance(value, Place)},
        )


def _factor(op: Followable) -> int:
    """Return a factor by which no size becomes another one among the arguments."""
    sizes = {size for shape in op.before.values() for size in shape}
    held = {op.before[slot][place.dim] for slot, place in op.places.items() if place.dim is not None}
    held.add(op.num_examples)
    for factor in _FACTORS:
        if not any(size * factor in sizes for size in held):
            return factor
    return max(sizes) + 1


def _stretch(
    op: Followable,
    extra: Mapping[Slot, Place],
    literals: Mapping[Slot, int],
    dropped: list[Slot],
    factor: int,
    target: Place | None = None,
) -> Followed | None:
    """Return what a run with stretched dimensions, without data, shows; None if it does not run."""
    places = {slot: place for slot, place in {**op.places, **extra}.items() if slot not in dropped}
    values: dict[Slot, object] = {slot: each * op.num_examples * factor for slot, each in literals.items()}
    for slot, tensor in tensors_of(op.call).items():
        shape = list(op.before[slot])
        place = places.get(slot)
        if place is not None and place.dim is not None:
            shape[place.dim] *= factor
        values[slot] = torch.empty(shape, dtype=tensor.dtype, device="meta")
    call = op.call.replace(values)
    try:
        with torch.no_grad(), torch._C.DisableTorchFunction():  # other modes must not see it
            result = call.run()
    except Exception:  # whatever it is: the operation does not run on such tensors
        return None
    results = outputs_of(result) if result is not None else [_tensor(values[_first_slot(op.call)])]
    if len(results) != len(op.shapes):
        return None
    kinds = set(places.values()) | ({target} if target is not None else set())
    outputs = [
        _read(shape, tuple(result.shape), factor, kinds, op.num_examples)
        for shape, result in zip(op.shapes, results, strict=True)
    ]
    return Followed(outputs, dict(extra), dict(literals), dropped)


def _read(
    real: torch.Size, stretched: tuple[int, ...], factor: int, kinds: set[Place], num_examples: int
) -> Place | None:
    """Return the place in an output: the one stretched dimension, with the order that it had before."""
    if len(real) != len(stretched):
        return None
    differing = [dim for dim, (a, b) in enumerate(zip(real, stretched, strict=True)) if a != b]
    if len(differing) != 1 or stretched[differing[0]] != factor * real[differing[0]]:
        return None
    dim = differing[0]
    orders = {
        kind.moved(0) for kind in kinds if kind.dim is not None and kind.size(num_examples) == real[dim]
    }
    return next(iter(orders)).moved(dim) if len(orders) == 1 else None


def _pick(op: Followable) -> list[Place | None] | None:
    """Return what a run on the examples' numbers, in place of data, shows; None if it does not run."""
    if op.call.name not in MOVES:
        return None
    first = _first_slot(op.call)
    values: dict[Slot, object] = {}
    for slot, tensor in tensors_of(op.call).items():
        if slot[: len(first)] != first:
            continue
        place, shape = op.places.get(slot), op.before[slot]
        if place is None:
            values[slot] = torch.full((1,) * len(shape), -1, device=tensor.device).expand(shape)
        elif place.dim is None:
            values[slot] = place.owner_vector(1).to(tensor.device).view((1,) * len(shape)).expand(shape)
        else:
            owners = place.owner_vector(op.num_examples).to(tensor.device)
            view = owners.view([-1 if dim == place.dim else 1 for dim in range(len(shape))])
            values[slot] = view.expand(shape)
    if not any(slot in op.places for slot in values):
        return None
    try:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            results = outputs_of(op.call.replace(values).run())
    except Exception:  # as above
        return None
    if [result.shape for result in results] != op.shapes:
        return None
    return [find_owners(result, op.num_examples) for result in results]


def _first_slot(call: Call) -> Slot:
    return (0, 0) if call.args else (1, next(iter(call.kwargs)))


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _follow_sequences(
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
