"""Batches that are kept, unless a step changed them or they are too large."""

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_influence.running.loaders import Held
from lightning_influence.running.reading import prepare_train


class Counting(Dataset):
    def __init__(self):
        self.read = 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.read += 1
        return torch.full((3,), float(index)), index


def values(batches):
    return torch.cat([batch[0] for batch in batches]).clone()


def test_batches_are_read_once():
    data = Counting()
    held = Held(DataLoader(data, 4), 2**20)
    first, second = values(held), values(held)
    assert data.read == 6
    torch.testing.assert_close(first, second)


def test_what_a_step_changed_is_read_anew():
    data = Counting()
    held = Held(DataLoader(data, 4), 2**20)
    for batch in held:
        batch[0].add_(5)
    torch.testing.assert_close(values(held), values(DataLoader(Counting(), 4)))
    assert data.read == 12
    list(held)
    assert data.read == 12


def test_too_much_is_not_kept():
    data = Counting()
    held = Held(DataLoader(data, 4), 30)
    assert len(list(held)) == len(list(held)) == 2
    assert data.read == 12


class Opaque:
    pass


def test_objects_whose_changes_are_not_seen_are_not_kept():
    source = [[torch.zeros(1), Opaque()]]
    held = Held(source, 2**20)
    list(held)
    assert held._kept is None
    nested = Held([{"x": [torch.zeros(1), "text", 3, None]}], 2**20)
    list(nested)
    assert nested._kept is not None


def test_an_interrupted_reading_keeps_nothing():
    data = Counting()
    held = Held(DataLoader(data, 4), 2**20)
    next(iter(held))
    assert len(list(held)) == 2
    assert data.read >= 6


def test_a_held_loader_has_the_same_batches_and_indices():
    loader = prepare_train(DataLoader(TensorDataset(torch.arange(7.0)), 3, shuffle=True))
    held = loader.held(2**20)
    for _ in range(2):
        for (one, left), (other, right) in zip(loader.shard(), held.shard(), strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(left, right)
