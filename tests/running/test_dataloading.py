"""Which examples a loader gives to a pass, in what order and with which indices."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.reading import prepare, prepare_train
from lightning_influence.support.errors import InfluenceWarning, UnsupportedDataError
from lightning_influence.support.random_states import preserve_rng

# Lightning's own use of torch's pytrees.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Squares(Dataset):
    """Item i is i squared, so that a batch tells which examples it holds."""

    def __init__(self, n=11):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.tensor(float(index) ** 2)


def visited(loader, rank=0, world_size=1):
    """Indices of every batch; checks that the batches hold those examples."""
    batches = []
    for batch, indices in loader.shard(rank, world_size):
        assert torch.equal(batch, indices.double().square().float())
        assert indices.dtype == torch.int64
        batches.append(indices.tolist())
    return batches


def flat(batches):
    return [index for batch in batches for index in batch]


ALL = list(range(11))


class Backwards(Sampler):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n - 1, -1, -1))

    def __len__(self):
        return self.n


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"shuffle": True}, ALL),
        ({"shuffle": True, "drop_last": True}, ALL),
        ({"sampler": SequentialSampler(range(6))}, ALL[:6]),
        ({"sampler": RandomSampler(range(11), replacement=True, num_samples=50)}, ALL),
        ({"sampler": RandomSampler(range(11), num_samples=3)}, ALL),
        ({"sampler": SubsetRandomSampler([9, 2, 5, 2])}, [2, 5, 9]),
        ({"sampler": WeightedRandomSampler([1.0] * 11, 30)}, ALL),
        ({"sampler": WeightedRandomSampler([0.0, 2.0, 2.0], 9)}, [1, 2]),
        ({"sampler": DistributedSampler(range(11), num_replicas=2, rank=1)}, ALL),
        ({"sampler": DistributedSamplerWrapper(SubsetRandomSampler([7, 1]), num_replicas=2, rank=0)}, [1, 7]),
        ({"sampler": Backwards(11)}, ALL),
        ({"sampler": list(range(10, -1, -1))}, ALL),
        ({"sampler": np.array([-1, 3, 0, *range(11)])}, ALL),
    ],
    ids=lambda value: (
        type(value["sampler"]).__name__ if isinstance(value, dict) and "sampler" in value else None
    ),
)
def test_each_example_once_in_ascending_order(options, expected):
    [loader] = prepare(DataLoader(Squares(), batch_size=4, **options))
    batches = visited(loader)
    assert flat(batches) == expected == loader.indices.tolist()
    assert [len(b) for b in batches[:-1]] == [4] * (len(batches) - 1)
    assert len(loader) == len(batches)
    assert loader.num_examples == len(expected)


def test_unequal_weights_are_reported():
    loader = DataLoader(Squares(3), sampler=WeightedRandomSampler([1.0, 2.0, 0.0], 9))
    with pytest.warns(InfluenceWarning, match="every example that it can draw once"):
        [prepared] = prepare(loader)
    assert prepared.indices.tolist() == [0, 1]


class Buckets:
    """A batch sampler of the user's own: fixed batches, some examples twice, in random order."""

    def __init__(self, batches, generator=None):
        self.batches = batches
        self.generator = generator

    def __iter__(self):
        for i in torch.randperm(len(self.batches), generator=self.generator).tolist():
            yield self.batches[i]

    def __len__(self):
        return len(self.batches)


def test_own_batch_samplers_keep_their_batches():
    class Ragged(Squares):
        def __getitem__(self, index):
            return torch.ones(1 + index % 2) * index  # only odd with odd can be stacked

    batches = [[1, 3, 5], [0, 2], [4, 4, 2], [6, 8, 10], [7, 9, 1]]
    [loader] = prepare(DataLoader(Ragged(), batch_sampler=Buckets(batches)))
    got = [(batch[:, 0].long().tolist(), indices.tolist()) for batch, indices in loader.shard()]
    assert all(held == indices for held, indices in got)
    assert sorted(flat(indices for _, indices in got)) == ALL
    assert {len({i % 2 for i in indices}) for _, indices in got} == {1}


def test_a_batch_sampler_subclass_is_iterated():
    class Halves(BatchSampler):
        def __iter__(self):
            yield from ([0, 1, 2], [3, 4])

    with pytest.warns(InfluenceWarning, match="Halves gave 5 of the dataset's 11 examples"):
        [loader] = prepare(
            DataLoader(Squares(), batch_sampler=Halves(SequentialSampler(Squares()), 3, False))
        )
    assert visited(loader) == [[0, 1, 2], [3, 4]]


def test_reading_leaves_generators_alone():
    generator = torch.Generator().manual_seed(3)
    own = torch.Generator().manual_seed(4)
    before = [torch.get_rng_state(), generator.get_state(), own.get_state()]
    for loader in (
        DataLoader(Squares(), shuffle=True, generator=generator),
        DataLoader(Squares(), batch_sampler=Buckets([[0, 1], [2], list(range(3, 11))], own)),
        DataLoader(Squares(), batch_sampler=Buckets([[0, 1], [2], list(range(3, 11))])),
    ):
        [prepared] = prepare(loader)
        with preserve_rng():
            visited(prepared)
    after = [torch.get_rng_state(), generator.get_state(), own.get_state()]
    assert all(map(torch.equal, before, after))


def test_indices_are_those_of_the_given_dataset():
    subset = Subset(Squares(), [10, 3])
    [loader] = prepare(DataLoader(subset, batch_size=2, shuffle=True))
    assert [(b.tolist(), i.tolist()) for b, i in loader.shard()] == [([100.0, 9.0], [0, 1])]
    joined = ConcatDataset([Squares(2), Squares(3)])
    [loader] = prepare(DataLoader(joined, batch_size=5))
    assert [(b.tolist(), i.tolist()) for b, i in loader.shard()] == [([0, 1, 0, 1, 4], [0, 1, 2, 3, 4])]


def triple(items):
    return torch.stack(items) * 3


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_and_collate_function_are_kept(persistent):
    loader = DataLoader(
        Squares(), batch_size=4, shuffle=True, num_workers=2, collate_fn=triple, persistent_workers=persistent
    )
    [prepared] = prepare(loader)
    for _ in range(2):
        got = [(batch / 3, indices) for batch, indices in prepared.shard()]
        assert flat(i.tolist() for _, i in got) == ALL
        assert all(torch.equal(batch, i.float().square()) for batch, i in got)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 9), world_size=st.integers(1, 5), own=st.booleans())
def test_shards_share_every_example_once(n, batch_size, world_size, own):
    options = {"batch_size": batch_size, "shuffle": True}
    if own:
        options = {
            "batch_sampler": Buckets([list(r) for r in np.array_split(range(n), max(1, n // batch_size))])
        }
    [loader] = prepare(DataLoader(Squares(n), **options))
    shares = [visited(loader, rank, world_size) for rank in range(world_size)]
    assert sorted(flat(flat(shares))) == list(range(n))
    sizes = [len(flat(share)) for share in shares]
    assert [loader.shard(rank, world_size).num_examples for rank in range(world_size)] == sizes
    if not own:
        assert max(sizes) - min(sizes) <= 1
        most = max(batch_size, 3) if batch_size > 1 else 1  # three examples are not two batches of two
        assert all(len(batch) <= most for share in shares for batch in share)
        if world_size > 1 and batch_size > 1:
            assert all(len(batch) > 1 for share in shares if len(flat(share)) > 1 for batch in share)


def test_processes_agree_on_own_batches_only():
    [own] = prepare(DataLoader(Squares(4), batch_sampler=Buckets([[0, 1], [2, 3]])))
    own.shard()
    own.agree(lambda plan: [torch.tensor([3]), torch.tensor([0, 1, 2])])
    assert visited(own) == [[3], [0, 1, 2]]
    [known] = prepare(DataLoader(Squares(4)))
    known.agree(lambda plan: pytest.fail("nothing to agree on"))


def test_ready_made_batches_are_numbered_in_order():
    batches = [(torch.zeros(3, 2), torch.zeros(3)), {"x": torch.zeros(1, 2)}, torch.zeros(2, 2)]
    [loader] = prepare(batches)
    got = list(loader.shard())
    assert [b is batch for (b, _), batch in zip(got, batches, strict=True)] == [True] * 3
    assert [i.tolist() for _, i in got] == [[0, 1, 2], [3], [4, 5]]
    assert [i.tolist() for _, i in loader.shard(1, 2)] == [[3]]


def test_several_loaders():
    first, second = DataLoader(Squares(3)), DataLoader(Squares(2))
    for several in (
        [first, second],
        {"a": first, "b": second},
        CombinedLoader([first, second], "sequential"),
    ):
        assert [loader.num_examples for loader in prepare(several)] == [3, 2]
    prepared = prepare([first, second])
    assert prepare(prepared) == prepared
    with pytest.raises(UnsupportedDataError, match=r"Got 2 training loaders.*ConcatDataset"):
        prepare_train([first, second])
    assert isinstance(prepare_train([first]), IndexedLoader)


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield 0


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream(0)), r"Stream has no examples"),
        (DataLoader(Squares(0), batch_size=2), r"The loader over Squares has no examples"),
        (DataLoader(Squares(), sampler=SubsetRandomSampler([])), r"no examples"),
        (DataLoader(Squares(), batch_sampler=[]), r"no examples"),
        (DataLoader(Squares(), batch_size=None), r"Batch 0 \(Tensor\) holds no tensor with examples"),
        (DataLoader(Squares(), sampler=Endless()), r"Endless does not end: it gave more than 120 items"),
        (DataLoader(Squares(), sampler=["a", "b"]), r"gives 'a' \(str\) as a dataset index"),
        ([], r"The list of loaders is empty"),
        ([torch.zeros(2, 3), ["text"]], r"Batch 1 \(list\) holds no tensor"),
        ([torch.zeros(2, 3), torch.zeros(0, 3)], r"Batch 1 \(Tensor\) holds no tensor"),
    ],
)
def test_what_cannot_be_attributed_is_refused(loader, message):
    with pytest.raises(UnsupportedDataError, match=message):
        prepare(loader)


def test_combined_batches_are_refused():
    with pytest.raises(UnsupportedDataError, match=r"mode='max_size'\) joins batches"):
        prepare(CombinedLoader([DataLoader(Squares())], "max_size"))


@pytest.mark.parametrize("wrong", [Squares(), iter([1]), 3, None, "text"])
def test_other_things_are_refused(wrong):
    with pytest.raises(TypeError, match=r"Expected a DataLoader over a map-style dataset.*; got "):
        prepare(wrong)


def test_mixed_lists_are_refused():
    with pytest.raises(TypeError, match=r"mixes loaders with something else \(DataLoader, Tensor\)"):
        prepare([DataLoader(Squares()), torch.zeros(2)])


def test_preserve_rng_covers_every_global_generator():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    with preserve_rng():
        first = draw()
    with pytest.raises(OSError, match="x"), preserve_rng():  # noqa: PT012
        draw()
        raise OSError("x")
    assert draw() == first


def test_a_dataset_of_tuples():
    [loader] = prepare(
        DataLoader(TensorDataset(torch.arange(3.0), torch.arange(3)), batch_size=2, shuffle=True)
    )
    assert [(x.tolist(), i.tolist()) for (x, _), i in loader.shard()] == [([0, 1], [0, 1]), ([2], [2])]


def test_a_loader_is_cut_to_single_examples_or_to_batches_that_hold_any():
    wanted = torch.tensor([1, 4, 7])
    [loader] = prepare(DataLoader(range(9), batch_size=2, shuffle=True))
    assert [indices.tolist() for _, indices in loader.only(wanted).shard()] == [[1, 4, 7]]
    assert [indices.tolist() for _, indices in loader.only(wanted[:2]).shard()] == [[1, 4]]
    [own] = prepare([torch.zeros(3, 1), torch.zeros(2, 1), torch.zeros(4, 1)])
    assert [indices.tolist() for _, indices in own.with_any(wanted[:2]).shard()] == [[0, 1, 2], [3, 4]]
    with pytest.raises(ValueError, match="library's own order"):
        own.only(wanted)


def test_parts_of_a_loader_hold_few_examples_in_order():
    [loader] = prepare(DataLoader(range(11), batch_size=4, shuffle=True))
    parts = loader.parts(5)
    assert [part.indices.tolist() for part in parts] == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert [len(indices) for _, indices in parts[0].shard()] == [3, 2]
    assert [part.num_examples for part in loader.parts(1)] == [2, 2, 2, 2, 3]
    [single] = prepare(DataLoader(range(3)))
    assert [part.num_examples for part in single.parts(1)] == [1, 1, 1]  # as the user's batches are
    [ready] = prepare([torch.zeros(2), torch.zeros(1), torch.zeros(3), torch.zeros(1)])
    assert [part.indices.tolist() for part in ready.parts(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [part.indices.tolist() for part in ready.parts(1)] == [[0, 1], [2], [3, 4, 5], [6]]


def test_loaders_that_hold_some_examples():
    [loader] = prepare(DataLoader(range(11), batch_size=4))
    assert loader.holding(torch.tensor([9, 2, 5])).indices.tolist() == [2, 5, 9]
    assert [loader.holding(torch.tensor([n])).indices.tolist() for n in (9, 0)] == [[0, 9], [0, 1]]
    [ready] = prepare([torch.zeros(2), torch.zeros(1), torch.zeros(3)])
    assert ready.holding(torch.tensor([5, 0])).indices.tolist() == [0, 1, 3, 4, 5]
