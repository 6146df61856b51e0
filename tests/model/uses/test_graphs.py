"""Rows that belong to the examples by an index: every parameter against automatic differentiation."""

import pytest
import torch
from graph_batches import GraphNet, join
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from use_oracle import numbers, reference_gradients, tokens

from lightning_influence.model.batches.ragged import find_places
from lightning_influence.model.uses import Watch, Way, differentiate_losses
from lightning_influence.model.uses.places import Place


def check(model, batch, count, losses_of, way=Way.USES):
    """All parameters are had in one way, and right."""
    parameters = dict(model.named_parameters())
    watch = Watch(parameters, batch, count, find_places(batch, count))
    with watch:
        losses = losses_of(model, batch)
    found = differentiate_losses(watch, losses)
    expected = reference_gradients(model, batch, losses_of)
    assert {name: report.way for name, report in found.report.parameters.items()} == dict.fromkeys(
        parameters, way
    )
    for name, reference in expected.items():
        torch.testing.assert_close(found.gradients[name].dense()[0], reference, rtol=1e-9, atol=1e-11)


def test_graphs_of_different_sizes():
    check(GraphNet(), join(), 4, lambda net, batch: (net(batch.graphs) - batch.y).square())


@pytest.mark.parametrize("lengths", [(2, 5, 3), (4, 4, 4)])
def test_packed_sequences(lengths):
    model = nn.LSTM(3, 4, batch_first=True).double()
    packed = pack_sequence([numbers(n, 3, seed=k) for k, n in enumerate(lengths)], enforce_sorted=False)
    check(
        model, (packed, numbers(3)), 3, lambda net, batch: (net(batch[0])[1][0][0].sum(1) - batch[1]).square()
    )


@pytest.mark.parametrize("form", ["offsets", "starts", "lengths"])
def test_flat_rows_with_numbers_of_rows(form):
    lengths = torch.tensor([2, 4, 3])
    starts = lengths.cumsum(0) - lengths
    index = {"lengths": lengths, "starts": starts, "offsets": torch.tensor([0, 2, 6, 9])}[form]
    model = nn.EmbeddingBag(11, 4, mode="mean", include_last_offset=form == "offsets").double()

    def losses(net, batch):
        words, index, y = batch
        bags = net(words, starts if form == "lengths" else index)
        return (bags.square().sum(1) - y).square()

    check(model, (tokens(9), index, numbers(3)), 3, losses)


@pytest.mark.parametrize("name", ["index_add", "scatter_add", "scatter_reduce"])
def test_rows_of_two_examples_that_meet_are_not_followed(name):
    rows, index = numbers(4, 2), torch.tensor([0, 1, 1, 0])
    watch = Watch({"w": nn.Parameter(numbers(2))}, (rows,), 2, {rows: Place(0, inner=2)})
    with watch:
        zeros = torch.zeros(2, 2, dtype=rows.dtype)
        if name == "index_add":
            mixed, apart = (zeros.index_add(0, some, rows) for some in (index, index.sort().values))
        else:
            more = ("sum",) if name == "scatter_reduce" else ()
            wide = index[:, None].expand(4, 2)
            mixed, apart = (
                getattr(zeros, name)(0, some, rows, *more) for some in (wide, wide.sort(0).values)
            )
    assert watch.place_of(mixed) is None
    assert watch.place_of(apart) == Place(0)
