"""Where the examples stand: through reshapes and through whole operations, with sizes that coincide."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from use_oracle import numbers

from lightning_influence.model.uses import Place, Watch
from lightning_influence.model.uses.places import find_owners, from_owners, reshape_place


def owners_of(place, shape, count):
    """The example of every element, by the definition of a place."""
    if place.dim is None:
        return torch.full(shape, place.owners[0])
    owners = place.owner_vector(count)
    return owners.view([-1 if dim == place.dim else 1 for dim in range(len(shape))]).expand(shape).clone()


@settings(deadline=None)
@given(st.data())
def test_a_reshape_keeps_every_element_with_its_example(data):
    sizes = st.integers(1, 4)
    count, outer, inner = data.draw(st.integers(2, 4)), data.draw(sizes), data.draw(sizes)
    before, after = data.draw(st.lists(sizes, max_size=2)), data.draw(st.lists(sizes, max_size=2))
    old = torch.Size([*before, outer * count * inner, *after])
    factors = [*before, outer, count, inner, *after]
    cuts = data.draw(st.lists(st.booleans(), min_size=len(factors), max_size=len(factors)))
    new, current = [], 1
    for factor, cut in zip(factors, cuts, strict=True):
        current *= factor
        if cut:
            new.append(current)
            current = 1
    new.append(current)
    place = Place(len(before), outer, inner)
    found = reshape_place(place, old, torch.Size(new), count)
    assert found is not None  # the batch was not cut in pieces
    moved = owners_of(place, old, count).reshape(new)
    assert torch.equal(owners_of(found, torch.Size(new), count), moved)


def test_a_batch_in_pieces_has_no_place():
    assert reshape_place(Place(0), torch.Size([4, 3]), torch.Size([2, 2, 3]), 4) is None


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 3))
def test_owners_in_order_have_the_regular_form(count, outer, inner):
    place = Place(1, outer, inner)
    assert from_owners(1, place.owner_vector(count).tolist(), count) == place
    assert find_owners(owners_of(place, (2, outer * count * inner, 3), count), count) == place


def test_splitting_gathers_what_belongs_to_an_example():
    values = torch.arange(12.0).view(2, 6)
    ragged = Place(1, owners=(2, 0, 0, 2, -1, 0))
    expected = [[[1, 7], [2, 8], [5, 11]], [[0, 0], [0, 0], [0, 0]], [[0, 6], [3, 9], [0, 0]]]
    assert ragged.split(values, 3).transpose(1, 2).tolist() == expected
    assert Place(1, outer=3).split(values, 2)[1].tolist() == [[1, 3, 5], [7, 9, 11]]
    assert Place(None, owners=(1,)).split(values, 3)[1].equal(values)


def follow(function, *shape, place, count=4):
    """Where a function of a tensor leaves the examples."""
    x = numbers(*shape)
    with Watch({}, x, count, places={x: place}) as watch:
        out = function(x)
    return watch.place_of(out)


B = 4
WAYS = {
    "transpose": (lambda x: x.transpose(0, 1), (B, B, 3), Place(0), Place(1)),
    "permute": (lambda x: x.permute(2, 0, 1), (B, B, B), Place(1), Place(2)),
    "property": (lambda x: x.mT, (B, B, B), Place(1), Place(2)),
    "movedim": (lambda x: x.movedim(1, 0), (B, B, B), Place(1), Place(0)),
    "sum of another": (lambda x: x.sum(0), (B, B, 3), Place(1), Place(0)),
    "sum, kept": (lambda x: x.sum(0, keepdim=True), (B, B, 3), Place(1), Place(1)),
    "picked": (lambda x: x[:, 1], (B, B, 3), Place(0), Place(0)),
    "picked first": (lambda x: x[1], (B, B, 3), Place(1), Place(0)),
    "new dimension": (lambda x: x[None, :, None], (B, B), Place(0), Place(1)),
    "one example": (lambda x: x[2], (B, B, 3), Place(0), Place(None, owners=(2,))),
    "reversed": (lambda x: x.flip(0), (B, B), Place(0), Place(0, owners=(3, 2, 1, 0))),
    "product": (lambda x: x @ numbers(B, B), (B, B), Place(0), Place(0)),
    "product from the left": (lambda x: numbers(B, B) @ x, (B, B), Place(1), Place(1)),
    "einsum": (lambda x: torch.einsum("abc,cd->dba", x, numbers(B, B)), (B, B, B), Place(1), Place(1)),
    "convolution": (lambda x: functional.conv2d(x, numbers(B, B, 1, 1)), (B, B, B, B), Place(0), Place(0)),
    "heads": (
        lambda x: x.view(6, B * 2, 3).transpose(0, 1), (6, B, 6), Place(1), Place(0, inner=2),
    ),
    "rows, examples last": (
        lambda x: x.transpose(0, 1).reshape(-1, 3), (B, 5, 3), Place(0), Place(0, outer=5),
    ),
    "behind each other": (lambda x: torch.cat([x, x]), (B, 3), Place(0), Place(0, outer=2)),
    "repeated": (lambda x: x.repeat_interleave(3, 0), (B, 3), Place(0), Place(0, inner=3)),
    "stacked": (lambda x: torch.stack([x, x], 1), (B, B), Place(0), Place(0)),
    "one by one": (lambda x: torch.stack([row for row in x]), (B, B), Place(0), Place(0)),
    "constant of the batch": (
        lambda x: torch.cat([torch.ones(B, 1), x.float()], 1), (B, B), Place(0), Place(0),
    ),
    "masked": (
        lambda x: x[torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0]]).bool()], (B, 2, 3), Place(0),
        Place(0, owners=(0, 1, 1, 3)),
    ),
    "no example left": (lambda x: x.mean(0), (B, B), Place(0), None),
    "examples with each other": (lambda x: x @ x.T, (B, 3), Place(0), None),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_examples_are_followed_whatever_other_sizes_are(way):
    function, shape, place, expected = WAYS[way]
    assert follow(function, *shape, place=place) == expected


def test_other_modes_and_the_random_state_see_nothing_of_it():
    seen = []

    class Outer(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout()), torch.randn(B, 3)
    torch.manual_seed(2)
    with Outer():
        plain = model(x)
    count, state = len(seen), torch.get_rng_state()
    torch.manual_seed(2)
    watch = Watch(dict(model.named_parameters()), x, B)
    with Outer(), watch:
        watched = model(x)
    assert torch.equal(plain, watched)
    assert torch.equal(state, torch.get_rng_state())
    assert len(watch.uses) == 1
    assert len(seen) == 2 * count


def test_packed_sequences_of_other_lengths_are_followed_anew():
    x = numbers(B, 6, 2)
    for lengths in ([6, 5, 5, 2], [6, 6, 3, 3]):  # of the same shapes
        with Watch({}, x, B) as watch:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True)
        owners = torch.tensor([n for time in range(6) for n in range(B) if time < lengths[n]])
        assert watch.place_of(packed.data) == Place(0, owners=tuple(owners.tolist()))


def assign(target, rows, values):
    target[rows] = values
    return target


WRITTEN = {
    "item": assign,
    "index_put_": lambda target, rows, values: target.index_put_((rows,), values),
    "index_put": lambda target, rows, values: target.index_put((rows,), values),
    "by name": lambda target, rows, values: target.index_put(indices=(rows,), values=values),
    "index_copy_": lambda target, rows, values: target.index_copy_(0, rows, values),
}


@pytest.mark.parametrize("write", WRITTEN)
def test_rows_written_to_other_places_are_followed_anew(write):
    x = numbers(B, 2)
    for rows in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]):  # of the same shapes
        with Watch({}, x, B) as watch:
            out = WRITTEN[write](torch.zeros(B, 2, dtype=x.dtype), torch.tensor(rows), x)
        assert watch.place_of(out).owner_vector(B).tolist() == torch.tensor(rows).argsort().tolist()


def test_sums_into_places_that_examples_share_are_not_followed():
    x = numbers(B, 2)
    with Watch({}, x, B) as watch:
        out = torch.zeros_like(x).index_put_((torch.tensor([0, 0, 1, 1]),), x, accumulate=True)
    assert watch.place_of(out) is None


def test_as_many_rows_as_values_decide():
    for found in ([False] * B, [True] * B, [True, False, False, True]):
        x = torch.tensor(found)
        with Watch({}, x, B) as watch:
            rows = torch.where(x)[0]
        expected = Place(0, owners=()) if not any(found) else None
        assert watch.place_of(rows) == expected
