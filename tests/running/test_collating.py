"""A collate function that sorts the examples would have scores given to others."""

import random
import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import DataLoader, default_collate

from lightning_influence.running.collating import OrderedCollate
from lightning_influence.running.reading import prepare
from lightning_influence.support.errors import InfluenceWarning, UnsupportedDataError

LENGTHS = (2, 5, 3, 4, 1, 6)
SEQUENCES = [(torch.full((length,), float(length)), torch.tensor(n)) for n, length in enumerate(LENGTHS)]


def in_order(items):
    return {
        "x": pad_sequence([x for x, _ in items], batch_first=True),
        "y": torch.stack([y for _, y in items]),
    }


def time_first(items):
    return pad_sequence([x for x, _ in items]), torch.stack([y for _, y in items])


def by_length(items):
    return in_order(sorted(items, key=lambda item: -len(item[0])))


def by_length_in_place(items):
    items.sort(key=lambda item: -len(item[0]))
    return time_first(items)


def with_positions(items):  # a part that is the same for every batch
    return {"position": torch.arange(len(items)), **in_order(items)}


def noisy(items):
    return torch.stack([y for _, y in items]) + torch.rand(len(items)), random.random()


def fails_in_reverse(items):
    if int(items[0][1]) > int(items[-1][1]):
        raise ValueError
    return in_order(items)


def consumes(items):
    return in_order([(item.pop("x"), item.pop("y")) for item in items])


def batches(collate, data=SEQUENCES, **options):
    loader = DataLoader(data, 3, collate_fn=collate, **options)
    return [batch for batch, _ in prepare(loader)[0].shard()]


@pytest.mark.grid
@pytest.mark.parametrize("collate", [by_length, by_length_in_place])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_that_sorts_is_refused(collate, workers):
    with pytest.raises(
        UnsupportedDataError, match=rf"collate_fn={collate.__name__} brings the examples.*keeps"
    ):
        batches(collate, num_workers=workers)


@pytest.mark.parametrize("collate", [in_order, time_first, with_positions, noisy, fails_in_reverse])
def test_others_are_not(collate):
    torch.manual_seed(0)
    random.seed(0)
    direct = [batch for batch in DataLoader(SEQUENCES, 3, collate_fn=collate)]
    torch.manual_seed(0)
    random.seed(0)
    assert repr(batches(collate)) == repr(direct)


def test_items_that_are_consumed_are_given_once():
    items = [{"x": x, "y": y} for x, y in SEQUENCES]
    assert len(batches(consumes, items)) == 2


def mix_up(items):
    inputs, labels = default_collate(items)
    other = torch.randperm(len(inputs))
    return 0.7 * inputs + 0.3 * inputs[other], labels


def cut_columns(items):
    inputs, labels = default_collate(items)
    inputs = inputs.clone()
    inputs[:, :1] = inputs[torch.randperm(len(inputs)), :1]
    return inputs, labels


def standardise(items):
    inputs, labels = default_collate(items)
    return inputs - inputs.mean(0), labels


def add_noise(items):
    inputs, labels = default_collate(items)
    return inputs + torch.randn_like(inputs), labels


@pytest.mark.parametrize("collate", [mix_up, cut_columns, standardise])
def test_a_collate_function_that_mixes_examples_is_named(collate):
    items = [(torch.randn(4), i % 3) for i in range(6)]
    with pytest.warns(InfluenceWarning, match=f"collate_fn={collate.__name__} mixes examples"):
        OrderedCollate(collate)(items)


def pack(items):
    return pack_sequence([x for x, _ in items], enforce_sorted=False), torch.stack([y for _, y in items])


def pack_by_length(items):
    return pack(sorted(items, key=lambda item: -len(item[0])))


def pack_mixed(items):
    other = torch.randperm(len(items))
    return pack([(x + items[n][0].mean(), y) for (x, y), n in zip(items, other, strict=True)])


def square(items):
    """As many time steps, in front, as there are examples."""
    return torch.stack([x[0].repeat(6).view(6) + torch.arange(6) for x, _ in items], 1)


@pytest.mark.parametrize("collate", [pack, square])
def test_what_holds_examples_elsewhere_than_in_rows_is_not_taken_for_mixing(collate):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OrderedCollate(collate)(list(SEQUENCES))


def test_packed_sequences_are_looked_into():
    with pytest.raises(UnsupportedDataError, match="order of its own"):
        OrderedCollate(pack_by_length)(list(SEQUENCES))
    with pytest.warns(InfluenceWarning, match="mixes examples"):
        OrderedCollate(pack_mixed)(list(SEQUENCES))


def test_noise_of_an_examples_own_is_not_taken_for_mixing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OrderedCollate(add_noise)([(torch.randn(4), i % 3) for i in range(6)])
