"""Running moments of losses: the same as those of all values, whatever the order, the epochs and the gaps."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutate

from lightning_influence.collecting.moments import Moments
from lightning_influence.support.errors import CorruptFileError

SIZE = 6


def expect(epochs):
    """Figures of each example from its list of epoch means, written without running sums."""
    found = {}
    for index in range(SIZE):
        losses = [np.mean([v[1] for v in epoch if v[0] == index]) for epoch in epochs if has(epoch, index)]
        margins = [np.mean([v[2] for v in epoch if v[0] == index]) for epoch in epochs if has(epoch, index)]
        shares = [
            np.mean([v[2] > 0 for v in epoch if v[0] == index]) for epoch in epochs if has(epoch, index)
        ]
        right = [share > 0.5 for share in shares]
        numbers = [number for number, epoch in enumerate(epochs) if has(epoch, index)]
        learned = [number for number, is_right in zip(numbers, right, strict=True) if is_right]
        found[index] = {
            "losses": (np.mean(losses), np.var(losses)) if losses else (0.0, 0.0),
            "margins": (np.mean(margins), np.var(margins)) if margins else (0.0, 0.0),
            "seen": len(losses),
            "right": sum(right),
            "forgotten": sum(a and not b for a, b in itertools.pairwise(right)),
            "first": learned[0] if learned else -1,
        }
    return found


def has(epoch, index):
    return any(value[0] == index for value in epoch)


VALUES = st.tuples(st.integers(0, SIZE - 1), st.floats(-50, 50, width=32), st.floats(-9, 9, width=32))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(VALUES, min_size=1, max_size=12), min_size=1, max_size=7), st.integers(1, 5))
def test_moments_are_those_of_all_values(epochs, batch):
    moments = Moments.start(SIZE)
    for number, epoch in enumerate(epochs):
        moments.epoch = number
        for start in range(0, len(epoch), batch):
            indices, losses, margins = zip(*epoch[start : start + batch], strict=True)
            moments.add(torch.tensor(indices), torch.tensor(losses), torch.tensor(margins))
        moments.fold()
    assert moments.epochs == len(epochs)
    for index, wanted in expect(epochs).items():
        seen, right, forgotten, first, _ = moments.counts[index].tolist()
        assert (seen, right, forgotten, first) == tuple(
            wanted[name] for name in ("seen", "right", "forgotten", "first")
        )
        floats = moments.floats[index].double().numpy()
        for place, name in ((0, "losses"), (2, "margins")):
            assert floats[place] == pytest.approx(wanted[name][0], abs=1e-4)
            assert floats[place + 1] / max(seen, 1) == pytest.approx(wanted[name][1], rel=1e-3, abs=1e-2)


def test_values_that_are_not_finite_are_not_counted():
    moments = Moments.start(3)
    nan, inf = float("nan"), float("inf")
    moments.add(torch.tensor([0, 1, 2]), torch.tensor([1.0, nan, 2.0]), torch.tensor([1.0, 1.0, inf]))
    moments.fold()
    assert moments.counts[:, 0].tolist() == [1, 0, 0]
    assert bool(moments.floats.isfinite().all())


def test_without_margins_losses_are_kept_and_it_is_known():
    moments = Moments.start(2)
    moments.add(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]), None)
    moments.fold()
    assert not moments.has_margins
    assert moments.floats[:, 0].tolist() == [1.0, 3.0]
    assert moments.batches == 1


def test_missed_batches_are_counted_with_their_reasons_once():
    moments = Moments.start(2)
    for _ in range(3):
        moments.miss("no indices")
    moments.add(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([1.0]))
    moments.fold()
    assert (moments.missed, moments.batches, moments.notes) == (3, 1, ["no indices"])


def test_an_epoch_without_values_is_none():
    moments = Moments.start(2)
    moments.fold()
    assert moments.epochs == 0


def example():
    moments = Moments.start(4)
    moments.epoch = 3
    moments.add(torch.tensor([0, 2]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0]))
    moments.fold()
    moments.epoch = 4
    moments.add(torch.tensor([1]), torch.tensor([5.0]), torch.tensor([0.5]))
    return moments


def test_a_state_goes_on_as_if_it_had_not_been_saved():
    first = example()
    second = Moments.from_state_dict(first.state_dict())
    for moments in (first, second):
        moments.add(torch.tensor([1, 3]), torch.tensor([7.0, 8.0]), torch.tensor([-1.0, 2.0]))
        moments.fold()
    assert torch.equal(first.floats, second.floats)
    assert torch.equal(first.counts, second.counts)
    assert second.counts[1].tolist()[0] == 1
    assert float(second.floats[1, 0]) == 6.0


def test_memory_is_52_bytes_an_example():
    moments = Moments.start(1000)
    used = sum(t.numel() * t.element_size() for t in (moments.floats, moments.counts, moments.sums))
    assert used == 52 * 1000 + 16


def test_a_damaged_state_is_refused():
    draw, refused = random.Random(0), 0
    for _ in range(200):
        try:
            moments = Moments.from_state_dict(mutate(example().state_dict(), draw))
        except CorruptFileError:
            refused += 1
            continue
        moments.fold()
    assert refused > 100
