"""Steps that do with later batches what they did not do with the first, and losses of chosen examples."""

import contextlib

import numpy as np
import pytest
import torch
from drive import mute
from torch import nn
from torch.nn import functional as F

from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.loss_values import compute_losses
from lightning_influence.model.losses.batch import BatchLoss
from lightning_influence.model.uses import following
from lightning_influence.model.uses.places import Place
from lightning_influence.support.errors import ReadOtherwiseError, UnsupportedModelError

IN_ORDER, OUT_OF_ORDER, OTHERS = [0, 0, 1, 2], [2, 0, 1, 0], [1, 2, 0, 1]


class Module(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.first, self.last, self.step = nn.Linear(3, 4), nn.Linear(4, 3), step

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))

    def training_step(self, batch, batch_idx):
        return self.step(self, *batch)


def make_batch(labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(labels), 3, generator=generator).double(), torch.tensor(labels)


def read(step, *batches):
    """Gradients of the examples' losses in the last batch, and the module."""
    torch.manual_seed(0)
    module = mute(Module(step)).double()
    forward = Forward(find_layers(module))
    for batch in batches:
        captured = forward(module, batch, len(batch[0]))
    scale = captured.loss.scale * captured.num_examples / captured.weights.sum()
    return scale * captured.loss_gradients()["first"].dense()[0, :, 0, :, :-1], module


def named(z, y):
    return F.cross_entropy(z, y)


def by_hand(z, y):
    return (z - F.one_hot(y, 3)).cosh().log().mean()


def sorted_by_label(y):
    return sorted(range(len(y)), key=lambda n: int(y[n]))


def stacked(x, y):
    order = sorted_by_label(y)
    return torch.stack([x[n] for n in order]), torch.stack([y[n] for n in order])


def joined(x, y):
    order = sorted_by_label(y)
    return torch.cat([x[n : n + 1] for n in order]), y[order]


def gathered(x, y):
    order = y.argsort(stable=True)
    return x.gather(0, order[:, None].expand(-1, 3)), y.gather(0, order)


def taken_along(x, y):
    order = y.argsort(stable=True)
    return x.take_along_dim(order[:, None].expand(-1, 3), dim=-2), y[order]


def through_numpy(x, y):
    order = np.argsort(y.numpy(), kind="stable")
    return torch.from_numpy(x.numpy()[order]), torch.from_numpy(y.numpy()[order])


@pytest.mark.grid
@pytest.mark.parametrize("arrange", [stacked, joined, gathered, taken_along])
@pytest.mark.parametrize("loss", [named, by_hand])
def test_rows_that_were_in_order_by_chance_are_followed_in_later_batches(arrange, loss):
    def step(module, x, y):
        x, y = arrange(x, y)
        return loss(module(x), y)

    x, y = make_batch(OUT_OF_ORDER, 1)
    found, module = read(step, make_batch(IN_ORDER), (x, y))
    for n in range(len(x)):
        value = loss(module(x[n : n + 1]), y[n : n + 1])
        torch.testing.assert_close(found[n], torch.autograd.grad(value, module.first.weight)[0])


@pytest.mark.grid
@pytest.mark.parametrize("first", [IN_ORDER, OUT_OF_ORDER])
@pytest.mark.parametrize("loss", [named, by_hand])
def test_rows_of_some_batches_only_are_followed(loss, first):
    """Batches in order have shown that layers are called on the examples, which holds for none in another."""

    def step(module, x, y):
        if y[0] > y[-1]:
            order = y.argsort(stable=True)
            x, y = x[order], y[order]
        return loss(module(x), y)

    second = OUT_OF_ORDER if first == IN_ORDER else IN_ORDER
    x, y = make_batch(first, 1)
    for batches in ([make_batch(second)], [make_batch(first), make_batch(second)]):
        found, module = read(step, *batches, (x, y))
        for n in range(len(x)):
            value = loss(module(x[n : n + 1]), y[n : n + 1])
            torch.testing.assert_close(found[n], torch.autograd.grad(value, module.first.weight)[0])


def flipped(x, y):
    return x.flip(0), y.flip(0)


WEIGHTS = [0.5, 2.0, 3.0]
CASES = [(arrange, weights) for arrange in (flipped, stacked, gathered) for weights in (None, WEIGHTS)]


def find_losses_after_one_in_order(step):
    """Outputs, targets and found losses of a batch out of order, after one in order was checked."""
    torch.manual_seed(0)
    module = mute(Module(step)).double()
    plan = find_layers(module)
    Forward(plan)(module, make_batch(IN_ORDER), 4)
    x, y = make_batch(OUT_OF_ORDER, 1)
    return module(x), y, compute_losses(module, (x, y), 4, verified=plan.verified)


# Rows that numpy has ordered are read by the losses of the examples alone, which have no weights.
@pytest.mark.parametrize(("arrange", "weights"), [*CASES, (through_numpy, None)])
@pytest.mark.parametrize("always", [False, True])
def test_values_of_losses_are_in_the_order_of_the_examples(arrange, always, weights):
    """Of batches, too, whose way no pass has checked: the first one was in order."""
    weights = None if weights is None else torch.tensor(weights).double()

    def step(module, x, y):
        if always or y[0] > y[-1]:
            x, y = arrange(x, y)
        return F.cross_entropy(module(x), y, weight=weights)

    outputs, y, found = find_losses_after_one_in_order(step)
    torch.testing.assert_close(found, F.cross_entropy(outputs, y, weight=weights, reduction="none"))


def test_a_step_that_fails_on_an_example_alone_gives_the_mean():
    """Where a batch of another way cannot be taken apart."""

    def step(module, x, y):
        if y[0] > y[-1]:
            x, y = flipped(x, y)
        assert len(x) > 1
        return named(module(x), y)

    outputs, y, found = find_losses_after_one_in_order(step)
    torch.testing.assert_close(found, named(outputs, y).expand(4))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_examples_with_weights_are_all_read_in_one_way(weights, monkeypatch):
    """A batch whose losses turn out to be no rows of functions with a name begins the question anew."""
    weights = None if weights is None else torch.tensor(weights).double()

    def refuse(self, captured, module, batch, measure=None):
        if not isinstance(captured.loss, BatchLoss):
            raise UnsupportedModelError("rows of others")

    module = mute(Module(lambda module, x, y: F.cross_entropy(module(x), y, weight=weights))).double()
    forward = Forward(find_layers(module))
    assert not isinstance(forward(module, make_batch(IN_ORDER), 4).loss, BatchLoss)
    monkeypatch.setattr(Forward, "_check_examples", refuse)
    with contextlib.nullcontext() if weights is None else pytest.raises(ReadOtherwiseError):
        forward(module, make_batch(OTHERS, 1), 4)
    assert isinstance(forward(module, make_batch(OTHERS, 1), 4).loss, BatchLoss)


class Measure:
    """Squared outputs; of a batch whose labels do not ascend in another order, put back or not."""

    needs_loss = False

    def __init__(self, puts_back):
        self.puts_back = puts_back

    def __call__(self, module, batch, *, loss, batch_size):
        x, y = batch
        if y[0] <= y[-1]:
            return module(x).square().sum(1)
        order = y.argsort(stable=True)
        values = module(x[order]).square().sum(1)
        return values[order.argsort()] if self.puts_back else values


def test_measured_rows_of_some_batches_only_are_followed():
    torch.manual_seed(0)
    module = mute(Module(None)).double()
    forward, (x, y) = Forward(find_layers(module)), make_batch(OUT_OF_ORDER, 1)
    forward(module, make_batch(IN_ORDER), 4, Measure(True))
    captured = forward(module, (x, y), 4, Measure(True))
    found = captured.loss_gradients()["first"].dense()[0, :, 0, :, :-1]
    for n in range(len(x)):
        value = module(x[n : n + 1]).square().sum()
        torch.testing.assert_close(found[n], torch.autograd.grad(value, module.first.weight)[0])


def test_values_that_are_in_another_order_for_some_batches_only_are_refused():
    torch.manual_seed(0)
    module = mute(Module(None)).double()
    forward = Forward(find_layers(module))
    forward(module, make_batch(IN_ORDER), 4, Measure(False))
    with pytest.raises(UnsupportedModelError, match="in the order of the batch"):
        forward(module, make_batch(OUT_OF_ORDER, 1), 4, Measure(False))


@pytest.mark.parametrize("loss", [named, by_hand])
def test_rows_that_nobody_can_follow_are_checked_in_every_batch(loss):
    def step(module, x, y):
        x, y = through_numpy(x, y)
        return loss(module(x), y)

    read(step, make_batch(IN_ORDER), make_batch(IN_ORDER, 1))
    with pytest.raises(UnsupportedModelError, match="influence_loss"):
        read(step, make_batch(IN_ORDER), make_batch(OUT_OF_ORDER, 1))


def test_rows_that_are_followed_wrongly_in_a_later_batch_are_found(monkeypatch):
    """Rows that a step picks are checked in more batches than the first."""

    def step(module, x, y):
        order = y.argsort(stable=True)
        hidden = torch.zeros(len(x), 4, dtype=x.dtype)
        hidden[order] = torch.tanh(module.first(x))[order]
        return named(module.last(hidden), y)

    def follow(op):
        return following.Followed([Place(0, owners=tuple(reversed(range(op.num_examples))))])

    first, other = make_batch(IN_ORDER), make_batch(OUT_OF_ORDER, 1)
    read(step, first, other)
    torch.manual_seed(0)
    module = mute(Module(step)).double()
    forward = Forward(find_layers(module))
    forward(module, first, 4)
    monkeypatch.setattr(following, "_follow_assignment", follow)
    with pytest.raises(UnsupportedModelError):
        forward(module, other, 4)


WAYS = {
    "flipped": lambda module, x, y: named(module(x.flip(0)), y),
    "centred": lambda module, x, y: named(module(x - x.mean(0)), y),
    "mixed": lambda module, x, y: named(module(0.7 * x + 0.3 * x.roll(1, 0)), y),
    "normalised": lambda module, x, y: by_hand(F.layer_norm(module(x).T, (len(x),)).T, y),
    "shortened": lambda module, x, y: named(module(x[1:]), y[1:]),
    "hardest": lambda module, x, y: F.cross_entropy(module(x), y, reduction="none").topk(2).values.mean(),
}


@pytest.mark.parametrize("other", WAYS)
def test_what_is_done_with_other_batches_only_is_refused(other):
    """The first batch shows nothing of it."""

    def step(module, x, y):
        plain = by_hand if other == "normalised" else named
        return plain(module(x), y) if y.sum() < 4 else WAYS[other](module, x, y)

    read(step, make_batch(IN_ORDER), make_batch(IN_ORDER, 1))
    with pytest.raises(UnsupportedModelError):
        read(step, make_batch(IN_ORDER), make_batch(OTHERS, 1))


def test_other_ways_that_are_sound_are_accepted():
    """What is done to examples of one kind, where there are any."""

    def step(module, x, y):
        outputs = module(x)
        if bool((y == 2).any()):
            outputs = torch.where((y == 2)[:, None], outputs.square(), outputs)
        return named(outputs, y)

    x, y = make_batch(OUT_OF_ORDER, 1)
    found, module = read(step, make_batch([0, 1, 1, 0]), (x, y))
    for n in range(len(x)):
        value = step(module, x[n : n + 1], y[n : n + 1])
        torch.testing.assert_close(found[n], torch.autograd.grad(value, module.first.weight)[0])


COUPLED = {
    "inputs less their mean": lambda x: x - x.mean(0),
    "inputs over their spread": lambda x: x / x.std(0),
    "inputs over the largest": lambda x: x / x.abs().max(),
    "inputs with a mean": lambda x: torch.cat([x[:, :2], x.mean().expand(len(x), 1)], 1),
}


@pytest.mark.grid
@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("count", [3, 4])
def test_inputs_that_depend_on_the_batch_are_refused(name, count):
    """Gradients in the weights do not show it."""

    def step(module, x, y):
        return F.cross_entropy(module(COUPLED[name](x)), y, torch.tensor([0.5, 1.0, 2.0]).double())

    with pytest.raises(UnsupportedModelError, match="influence_loss"):
        read(step, make_batch(OUT_OF_ORDER[:count]))


CHOICES = {
    "largest": lambda losses: losses.topk(2).values.mean(),
    "sorted": lambda losses: losses.sort().values[:2].sum(),
    "one": lambda losses: losses.max(),
    "above the median": lambda losses: losses[losses > losses.median()].mean(),
    "above the mean": lambda losses: (losses * (losses >= losses.mean())).sum(),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_examples_that_count_by_what_the_others_are_are_refused(choice):
    def step(module, x, y):
        return CHOICES[choice](F.cross_entropy(module(x), y, reduction="none"))

    with pytest.raises(UnsupportedModelError, match="influence_loss"):
        read(step, make_batch(OUT_OF_ORDER))


@pytest.mark.parametrize("reduce", ["mean", "by hand", "of all"])
def test_examples_that_never_count_are_accepted(reduce):
    def step(module, x, y):
        mask, y = y > 0, y.masked_fill(y == 0, -100)
        if reduce == "mean":
            return named(module(x), y)
        losses = F.cross_entropy(module(x), y, reduction="none")
        return (losses * mask).sum() / (mask.sum() if reduce == "by hand" else len(x))

    found, _ = read(step, make_batch(OUT_OF_ORDER))
    assert [bool(own.any()) for own in found] == [True, False, True, False]


@pytest.mark.parametrize("labels", [[0, 0], [0, 1]])
def test_two_examples_whose_outputs_are_mixed_are_refused(labels):
    """Of two examples, some ways to read a batch show nothing but that it may be reversed."""

    def step(module, x, y):
        z = module(x)
        return F.cross_entropy(z + 0.3 * z.roll(1, 0), y)

    with pytest.raises(UnsupportedModelError, match="examples"):
        read(step, make_batch(labels))
