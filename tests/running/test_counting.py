"""How many examples ready-made batches hold: lists and indices that may be read in two ways."""

import pytest
import torch

from lightning_influence.model.uses.places import Place
from lightning_influence.model.uses.watch import find_examples
from lightning_influence.running.reading import prepare
from lightning_influence.support.batches import ExampleList
from lightning_influence.support.errors import UnsupportedDataError


def columns(count, *shapes, wrap=lambda entry: entry):
    return {"lists": [[wrap(torch.zeros(shape)) for _ in range(count)] for shape in shapes]}


def sizes(*batches):
    [loader] = prepare(list(batches))
    read = list(loader.shard())
    return [len(indices) for _, indices in read], [batch for batch, _ in read]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_lists_of_unlike_rows_hold_an_example_an_entry(count):
    """Three images of three channels each, with one label: no row of theirs is an example."""
    found, [batch] = sizes(columns(count, (3, 4), ()))
    assert found == [count]
    assert all(isinstance(part, ExampleList) for part in batch["lists"])
    tensors = [tensor for part in batch["lists"] for tensor in part]
    places = find_examples(batch, count, {})
    assert len(places) == len(tensors)
    assert all(place == Place(None, owners=(place.owners[0],)) for _, place in places)


def test_batches_that_differ_in_the_number_of_entries_or_of_rows_tell_which_are_examples():
    assert sizes(columns(3, (4, 2), (4,)), columns(2, (4, 2), (4,)))[0] == [3, 2]
    assert sizes(columns(2, (4, 2), (4,)), columns(2, (3, 2), (3,)))[0] == [4, 3]
    beside = {"views": [[torch.zeros(4, 2)] * 2, [torch.zeros(4)] * 2], "y": torch.zeros(4)}
    assert sizes(beside)[0] == [4]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_lists_that_may_be_read_in_two_ways_are_refused(count):
    with pytest.raises(UnsupportedDataError, match=r"lists of \d tensors, all with 4 rows.*torch.stack"):
        prepare([columns(count, (4, 2), (4,))])


def test_entries_of_several_tensors_are_examples():
    batch = columns(3, (4,), (), wrap=lambda entry: (entry, entry + 1))
    found, [marked] = sizes(batch)
    assert found == [3]
    owners = [place.owners[0] for _, place in find_examples(marked, 3, {})]
    assert sorted(owners) == [0] * 4 + [1] * 4 + [2] * 4


LABELS, INPUTS, TWO = torch.tensor([0, 0, 1, 1]), torch.zeros(4, 3), torch.ones(2)


def test_labels_in_order_beside_a_tensor_of_as_many_rows_as_classes_are_no_index():
    with pytest.raises(UnsupportedDataError, match=r"labels of 4 examples.*rows to 2 examples"):
        prepare([(INPUTS, LABELS, TWO)])
    assert sizes((INPUTS, LABELS, TWO), (INPUTS, LABELS.flip(0), TWO))[0] == [4, 4]
    assert sizes((INPUTS, LABELS, torch.ones(3)))[0] == [4]  # as many as offsets, and none


def test_an_index_is_known_by_edges_or_offsets_or_by_its_length():
    edges = torch.tensor([[0, 2, 3], [1, 3, 2]])
    assert sizes((INPUTS, LABELS, TWO, edges))[0] == [2]
    assert sizes((INPUTS, LABELS, torch.tensor([0, 2, 4])))[0] == [2]
    long = torch.arange(4).repeat_interleave(5)
    assert sizes((torch.zeros(20, 3), long, torch.ones(4)))[0] == [4]


def test_images_of_several_sizes_are_counted_by_their_labels():
    images = [torch.zeros(1, n, n + 1) for n in (3, 5, 4)]
    labels = torch.zeros(3)
    assert sizes((images, labels), (tuple(images), labels), {"x": images[:2], "y": labels[:2]})[0] == [
        3,
        3,
        2,
    ]
    colours = [torch.zeros(3, n, n) for n in (3, 5, 4, 6)]
    assert sizes((colours, torch.zeros(4)))[0] == [4]
    assert sizes((torch.zeros(4, 8), torch.zeros(4, 3)), ([*colours[:2]], torch.zeros(3)))[0] == [4, 3]


def test_tuples_side_by_side_are_lists_where_their_rows_differ():
    targets = [{"boxes": torch.zeros(n, 4), "labels": torch.zeros(n)} for n in (2, 1, 5)]
    images = [torch.zeros(3, 4, 4)] * 3
    found, [batch] = sizes(tuple(zip(*zip(images, targets, strict=True), strict=True)))
    assert found == [3]
    assert all(isinstance(part, ExampleList) for part in batch)
    views = ((torch.zeros(4, 2), torch.zeros(4, 3)), (torch.zeros(4), torch.zeros(4)))
    assert sizes(views)[0] == [4]


def test_lists_of_features_hold_the_rows_of_all_examples():
    """Indices of three features, each for all of four examples, with offsets."""
    indices = [torch.zeros(n).long() for n in (6, 4, 9)]
    offsets = torch.zeros(3, 4).long()
    assert sizes((torch.zeros(4, 2), indices, list(offsets), torch.zeros(4)))[0] == [4]
    assert sizes((torch.zeros(4, 2), offsets, indices, torch.zeros(4)))[0] == [4]
