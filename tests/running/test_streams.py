"""Loaders whose examples have no index, and batches that no pass makes of one example."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, TensorDataset

from lightning_influence.running.loaders import split_indices
from lightning_influence.running.reading import prepare
from lightning_influence.support.errors import InfluenceWarning, UnsupportedDataError


class Numbers(IterableDataset):
    """Rows with their number, in an order drawn anew in each iteration if a generator is given."""

    def __init__(self, count, draw=None):
        self.count, self.draw = count, draw

    def __iter__(self):
        order = range(self.count) if self.draw is None else self.draw().permutation(self.count)
        return ((torch.tensor([float(n)]) + torch.rand(1) * 0.1, int(n)) for n in order)


class Doubling(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield 2 * x, y


def read(loader):
    with pytest.warns(InfluenceWarning, match="numbered in the order in which they come"):
        [found] = prepare(loader)
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterable_dataset_is_numbered_as_it_comes(workers):
    loader = read(DataLoader(Numbers(5), batch_size=2, num_workers=workers))
    plan = [indices.tolist() for _, indices in loader.shard()]
    assert plan == [[0, 1], [2, 3], [4]]
    first = [batch for batch, _ in loader.shard()]
    torch.rand(3)  # a step that draws in between does not change what is read
    again = []
    for batch, _ in loader.shard():
        torch.rand(1)
        again.append(batch)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))


def test_reading_a_stream_leaves_the_random_states_of_others():
    torch.manual_seed(0)
    loader = read(DataLoader(Numbers(5), batch_size=2))
    drawn = [torch.rand(1).item()]
    for _ in loader.shard():
        drawn.append(torch.rand(1).item())
    torch.manual_seed(0)
    assert drawn == [torch.rand(1).item() for _ in drawn]


def test_parts_of_a_stream_come_in_its_order():
    loader = read(DataLoader(Numbers(9), batch_size=2))
    some = loader.with_any(torch.tensor([5, 1]))
    assert [(y.tolist(), i.tolist()) for (_, y), i in some.shard()] == [([0, 1], [0, 1]), ([4, 5], [4, 5])]
    for (_, y), indices in loader.sample(5, seed=3).shard():
        assert y.tolist() == indices.tolist()
    [left, right] = [loader.shard(rank, 2) for rank in range(2)]
    assert sorted(n for shard in (left, right) for (_, y), _ in shard for n in y.tolist()) == list(range(9))


OUT_OF_REACH = np.random.default_rng(0)


def draw_out_of_reach():
    return OUT_OF_REACH


def test_a_stream_may_draw_its_order_from_a_generator_that_it_holds():
    own = np.random.default_rng(0)
    before = own.bit_generator.state
    loader = read(DataLoader(Numbers(6, draw=lambda: own), batch_size=2))
    orders = [[y.tolist() for (_, y), _ in loader.shard()] for _ in range(2)]
    assert orders[0] == orders[1] != [[0, 1], [2, 3], [4, 5]]
    assert own.bit_generator.state == before


def test_another_order_is_refused():
    loader = read(DataLoader(Numbers(6, draw=draw_out_of_reach), batch_size=2))
    with pytest.raises(
        UnsupportedDataError, match=r"Batch 0 of Numbers is another one .* turn shuffling off"
    ):
        list(loader.shard())


def test_loaders_that_change_their_batches_are_read_as_they_come():
    data = TensorDataset(torch.arange(5.0)[:, None], torch.arange(5))
    loader = read(Doubling(data, batch_size=2))
    assert [x.flatten().tolist() for (x, _), _ in loader.shard()] == [[0, 2], [4, 6], [8]]


class Cycling(DataLoader):
    """Has more batches than its length, as loaders that go round do; Lightning stops at the length."""

    def __iter__(self):
        while True:
            yield from super().__iter__()


def test_no_more_batches_are_read_than_a_loader_says_it_has():
    loader = read(Cycling(TensorDataset(torch.arange(5.0)[:, None]), batch_size=2))
    assert [indices.tolist() for _, indices in loader.shard()] == [[0, 1], [2, 3], [4]]


def test_batches_of_a_dataset_without_single_items():
    class Batches(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, n):
            return torch.full((n + 1, 2), float(n))

    loader = read(DataLoader(Batches(), batch_size=None))
    assert [indices.tolist() for _, indices in loader.shard()] == [[0], [1, 2], [3, 4, 5]]


class Table(torch.utils.data.Dataset):
    """A dataset that is asked for many items at once."""

    def __len__(self):
        return 7

    def __getitem__(self, indices):
        return torch.tensor(indices) * 10


class Blocks(Sampler):
    def __init__(self):
        pass

    def __iter__(self):
        yield from ([4, 2], [0, 6, 1], [3, 5])

    def __len__(self):
        return 3


@pytest.mark.parametrize("drop_last", [False, True])
def test_samplers_of_batches_keep_the_datasets_indices(drop_last):
    data = Table()
    loader = DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 3, drop_last))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [found] = prepare(loader)
    assert found.ordered
    # All examples, and where the fit saw full batches only, none of one.
    assert [len(i) for _, i in found.shard()] == ([3, 2, 2] if drop_last else [3, 3, 1])
    for batch, indices in found.shard():
        assert batch.tolist() == (indices * 10).tolist()
    [own] = prepare(DataLoader(data, batch_size=None, sampler=Blocks()))
    assert [batch.tolist() for batch, _ in own.shard()] == [[40, 20], [0, 60, 10], [30, 50]]


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (7, 3, [3, 2, 2]),
        (5, 2, [2, 3]),
        (4, 3, [2, 2]),
        (6, 3, [3, 3]),
        (1, 3, [1]),
        (3, 1, [1, 1, 1]),
        (0, 3, [0]),
    ],
)
def test_no_batch_of_one_is_made(count, size, expected):
    parts = split_indices(torch.arange(count), size)
    assert [len(part) for part in parts] == expected
    assert torch.cat(parts).tolist() == list(range(count))


def test_samples_have_no_batch_of_one():
    [loader] = prepare(DataLoader(range(20), batch_size=4, shuffle=True))
    for count in range(2, 20):
        assert min(len(i) for _, i in loader.sample(count).shard()) > 1
        assert loader.sample(count).num_examples == count
