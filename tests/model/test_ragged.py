"""Parts of batches of all kinds are those that the collate function would have made of these examples."""

import types
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from drive import mute
from graph_batches import NODES, GraphNet, join
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, default_collate

from lightning_influence import InfluenceModule
from lightning_influence.model.batches.ragged import find_rows
from lightning_influence.model.batches.rearranging import UnknownPartError, find_layouts, rearranged
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.support.batches import copy_tensors, find_tensors, guess_count
from lightning_influence.support.errors import UnsupportedModelError

ORDERS = ([3, 1], [0, 2, 3], [3, 2, 1, 0], [2])


def assert_same(found, expected):
    pairs = list(zip(find_tensors(found), find_tensors(expected), strict=True))
    assert pairs
    for a, b in pairs:
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", ORDERS)
def test_graphs_are_joined_anew(order):
    batch = join()
    found = rearranged(batch, order, len(NODES))
    assert_same(found, join(order))
    assert type(found) is type(batch)
    assert type(found.graphs) is type(batch.graphs)
    assert len(found.graphs) == len(order)
    assert len(batch.graphs) == len(NODES)


@pytest.mark.parametrize("order", ORDERS)
def test_graphs_with_offsets_as_mappings(order):
    def form(batch):
        graphs = batch.graphs
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(graphs.owner).cumsum(0)])
        return {"x": graphs.nodes, "edge_index": graphs.edge_index, "ptr": offsets, "y": batch.y}

    assert_same(rearranged(form(join()), order, len(NODES)), form(join(order)))


class Joined:
    """Graphs that can be given out and joined anew, as the best-known library for graphs has them."""

    def __init__(self, items):
        self.items, self.x = items, torch.cat(items)

    def get_example(self, number):
        return self.items[number]

    @classmethod
    def from_data_list(cls, items):
        return cls(items)


def test_graphs_that_join_themselves():
    items = [torch.full((n, 2), float(n)) for n in NODES]
    found = rearranged([Joined(items), torch.arange(4)], [3, 1], 4)
    assert torch.equal(found[0].x, torch.cat([items[3], items[1]]))
    assert found[1].tolist() == [3, 1]


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    note: str = "a"


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


Pair = namedtuple("Pair", "x y")
X = torch.arange(12.0).view(4, 3)


@pytest.mark.parametrize(
    "batch",
    [
        Frozen(X),
        Slotted(X),
        Pair(X, ["a", "b", "c", "d"]),
        types.SimpleNamespace(x=X, inner={"deep": [X]}),
        types.MappingProxyType({"x": X}),
        [X, np.arange(4)],
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_objects_are_taken_apart_and_copied(batch):
    found = rearranged(batch, [2, 0], 4)
    for a, b in zip(find_tensors(found), find_tensors(batch), strict=True):
        assert torch.equal(a, b[[2, 0]])
    copied = copy_tensors(batch)
    for a, b in zip(find_tensors(copied), find_tensors(batch), strict=True):
        assert torch.equal(a, b)
        assert a is not b
    assert guess_count(batch) == 4
    if isinstance(batch, list):
        assert found[1].tolist() == [2, 0]
    if isinstance(batch, Pair):
        assert found.y == ["c", "a"]


def test_packed_sequences_are_packed_anew():
    parts = [torch.randn(n, 3) for n in (2, 5, 3)]
    packed = pack_sequence(parts, enforce_sorted=False)
    found = rearranged((packed, torch.arange(3)), [2, 0], 3)[0]
    padded, lengths = pad_packed_sequence(found, batch_first=True)
    assert lengths.tolist() == [3, 2]
    assert torch.equal(padded[0], parts[2])
    assert torch.equal(padded[1, :2], parts[0])
    assert guess_count((packed, torch.arange(3))) == 3
    with pytest.raises(UnknownPartError):
        rearranged(packed, [0, 1], 5)


def test_the_number_of_examples_of_ready_made_batches():
    assert guess_count(join()) == len(NODES)
    assert guess_count(([X[:2], X], torch.arange(2))) == 2
    assert guess_count((X, X[:, :2])) == 4
    assert guess_count({"a": [1, 2], "x": X}) == 4
    assert guess_count(["a", None, 3]) is None


def test_labels_are_no_index_of_rows():
    x, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    assert find_rows([x, labels], 4) == {}
    # Tokens of a vocabulary, and times, in a batch with a mask of time steps.
    assert find_rows([torch.randint(0, 9, (4, 6)), torch.ones(6, 6), torch.arange(6), labels], 4) == {}
    # Labels that sum to the number of classes, or of time steps.
    assert find_rows([x, torch.tensor([1, 2, 3, 4]), torch.ones(10), torch.ones(10, 10)], 4) == {}


class Step(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.first, self.last, self.loss = nn.Linear(3, 3), nn.Linear(3, 4), loss
        self.double()

    def training_step(self, batch, batch_idx):
        return self.loss(self.last(torch.tanh(self.first(batch[0]))), *batch[1:])


B = 4
INPUTS, LABELS = torch.randn(B, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 3])
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)
MASK = torch.ones(B, B, dtype=torch.float64).tril()


def weighted(out, labels, weights):
    """Classes as many as examples; the mean is over examples, not over weights."""
    return (F.cross_entropy(out, labels, reduction="none") * weights[labels]).mean()


def masked(out, labels, mask):
    """A matrix of time steps, as many as examples, in the batch."""
    return (out @ mask - F.one_hot(labels, 4)).square().mean()


def own_loss(out, labels, extra):
    """Without a name: a quantile loss of weighted classes."""
    error = F.one_hot(labels, 4) - out * extra
    return torch.maximum(0.3 * error, -0.7 * error).mean()


@pytest.mark.parametrize(
    ("loss", "extra"), [(weighted, CLASS_WEIGHTS), (masked, MASK), (own_loss, CLASS_WEIGHTS)]
)
@pytest.mark.filterwarnings("error:.*could not be taken apart")
def test_what_is_as_long_as_the_batch_by_chance_belongs_to_all(loss, extra):
    torch.manual_seed(0)
    module = mute(Step(loss))
    batch = INPUTS, LABELS, extra
    captured = Forward(find_layers(module))(module, batch, B)
    found = captured.loss_gradients()["last"].dense()[0, :, 0] / captured.weights.mean()
    for n in range(B):
        value = module.training_step((INPUTS[n : n + 1], LABELS[n : n + 1], extra), 0)
        weight, bias = torch.autograd.grad(value, list(module.last.parameters()))
        torch.testing.assert_close(found[n], torch.cat([weight, bias[:, None]], 1))


def test_examples_that_are_coupled_are_refused_whatever_else_is_in_the_batch():
    module = mute(Step(lambda out, labels, extra: out.square().mean().sqrt() * extra.sum()))
    with pytest.raises(UnsupportedModelError, match="not made of losses of its examples"):
        Forward(find_layers(module))(module, (INPUTS, LABELS, CLASS_WEIGHTS), B)


def test_readings_of_a_batch():
    readings = list(find_layouts((INPUTS, MASK, LABELS), B))
    assert readings[0] == {}
    assert {1: None} in readings
    assert {1: 1} in readings
    assert {0: None, 2: None} in readings
    # Where all is square, columns are not tried: they would make a wrong order look right.
    assert {0: 1} not in list(find_layouts((MASK, MASK), B))


def test_graph_losses_by_value_are_checked_on_parts():
    """The loss of a batch of graphs has no name, and its examples are found to add up."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = GraphNet()

        def training_step(self, batch, batch_idx):
            error = self.net(batch.graphs) - batch.y
            return torch.maximum(0.2 * error, -0.8 * error).mean()

    module = mute(Module())
    forward = Forward(find_layers(module, ["net.head"]))
    captured = forward(module, join(), len(NODES))
    assert captured.loss.reduction == "example_mean"
    found = captured.loss_gradients()["net.head"].dense()[0, :, 0]
    for n in range(len(NODES)):
        weight, bias = torch.autograd.grad(
            module.training_step(join([n]), 0), list(module.net.head.parameters())
        )
        torch.testing.assert_close(found[n], torch.cat([weight, bias[:, None]], 1))


def test_collated_batches_keep_their_kind():
    Item = namedtuple("Item", "x y")
    batch = default_collate([Item(torch.randn(3), n) for n in range(4)])
    assert rearranged(batch, [1], 4).y.tolist() == [1]


@pytest.mark.parametrize("labels", [[0, 0, 1], [0, 0, 0, 1, 1, 2], [0, 1, 1, 2]])
def test_labels_in_order_are_no_index(labels):
    batch = (torch.randn(len(labels), 4), torch.tensor(labels))
    assert guess_count(batch) == len(labels)


class Clicks(LightningModule):
    """Bags of three features, each with the indices of all examples in one tensor."""

    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(5, 2, mode="sum") for _ in range(3))
        self.top = nn.Linear(6, 1)
        self.double()

    def training_step(self, batch, batch_idx):
        indices, offsets, y = batch
        parts = [bag(*given) for bag, *given in zip(self.bags, indices, offsets, strict=True)]
        return F.binary_cross_entropy_with_logits(self.top(torch.cat(parts, 1))[:, 0], y)


def join_clicks(items):
    columns = list(zip(*(indices for indices, _ in items), strict=True))
    offsets = [torch.tensor([0, *map(len, column[:-1])]).cumsum(0) for column in columns]
    return [torch.cat(column) for column in columns], offsets, torch.stack([y for _, y in items])


def test_lists_of_features_are_not_taken_for_those_of_as_many_examples():
    """The last batch holds as many examples as there are features, and may be read in two ways."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda high, *size: torch.randint(high, size, generator=generator)  # noqa: E731
    sizes = (1 + draw(4, 7, 3)).tolist()
    items = [([draw(5, size) for size in row], draw(2, 1)[0].double()) for row in sizes]
    module = Clicks()
    loader = DataLoader(items, 4, collate_fn=join_clicks)
    found = InfluenceModule(module).scores(loader, loader, method="identity").scores
    parameters = list(module.parameters())
    rows = [
        torch.autograd.grad(module.training_step(join_clicks([item]), 0), parameters, materialize_grads=True)
        for item in items
    ]
    own = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    torch.testing.assert_close(found, own @ own.T / len(items))
