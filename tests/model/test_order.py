"""Losses whose rows are in another order than the examples: read by the outputs of modules, or refused."""

import warnings

import pytest
import torch
from drive import mute
from torch import nn
from torch.nn import functional as F

from lightning_influence.model.batches.rearranging import UnknownPartError, missing_positions, rearranged
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.loss_values import compute_losses
from lightning_influence.support.errors import InfluenceWarning, UnsupportedModelError

B, T = 4, 8
EIGHT = 8  # enough that halves of a batch show the order


class Module(nn.Module):
    def __init__(self, step) -> None:
        super().__init__()
        self.first, self.last, self._step = nn.Linear(3, 3), nn.Linear(3, 2), step

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))

    def training_step(self, batch, batch_idx):
        return self._step(self, *batch)


def run(step, *batches):
    torch.manual_seed(0)
    module = mute(Module(step))
    forward = Forward(find_layers(module))
    for batch in batches:
        forward(module, batch, len(batch[0]))


def sequences(*lengths: int):
    """Padded to the longest: inputs, labels, and a mask."""
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    x, y = torch.randn(len(lengths), width, 3), torch.randint(2, (len(lengths), width))
    return x, y.masked_fill(~mask, -100), mask


def batch_first(module, x, y, mask):
    return F.cross_entropy(module(x).flatten(0, 1), y.flatten())


def time_first(module, x, y, mask):
    return F.cross_entropy(module(x.transpose(0, 1)).flatten(0, 1), y.T.flatten())


def packed(module, x, y, mask):
    return F.cross_entropy(module(x[mask]), y[mask])


def sorted_inside(module, x, y, mask):
    order = mask.sum(1).argsort(descending=True, stable=True)
    return F.cross_entropy(module(x[order]).flatten(0, 1), y[order].flatten())


def flipped(module, x, y, mask):
    return F.cross_entropy(module(x.flip(0)).flatten(0, 1), y.flip(0).flatten())


def put_back(module, x, y, mask):
    """Losses of single positions of sorted examples, in the order of the batch again."""
    order = mask.sum(1).argsort(descending=True, stable=True)
    losses = F.cross_entropy(module(x[order]).mT, y[order], reduction="none")
    return losses[order.argsort()].sum() / mask.sum()


def shifted(module, x, y, mask):
    return F.cross_entropy(module(x)[:, :-1].flatten(0, 1), y[:, 1:].flatten())


def gradients_of(captured):
    """Gradients of the examples' losses as the scores take them: weights of positions are their mean's."""
    scale = captured.loss.scale * captured.num_examples / captured.weights.sum()
    return scale * captured.loss_gradients()["first"].dense()[0, :, 0, :, :-1]


@pytest.mark.parametrize("step", [batch_first, shifted])
def test_losses_in_the_order_of_the_examples_are_accepted(step):
    run(step, sequences(*[T] * B), sequences(2, 5, 3, 4), sequences(3, 4))


@pytest.mark.parametrize(
    ("lengths", "sizes"), [((2, 5, 3, 4, 6, 2, 7, 1), [8, 4, 4]), ((2, 5), [2, 2, 1, 1, 1])]
)
def test_halves_in_another_order_show_what_whole_batches_do(lengths, sizes):
    seen = []

    def step(module, x, y, mask):
        seen.append(len(x))
        return batch_first(module, x, y, mask)

    run(step, sequences(*lengths))
    assert seen == sizes


def swapped(module, x, y, mask):
    """Only batches of this very size run, so that no part of one shows what the rows are."""
    return F.cross_entropy(module(x)[[0, 1, 3, 2]].flatten(0, 1), y.flatten())


def test_rows_in_another_order_of_which_no_parts_run_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"at other examples.*influence_loss"):
        run(swapped, sequences(2, 5, 3, 4))


@pytest.mark.parametrize(
    ("step", "lengths"),
    [
        (time_first, (T,) * B),
        (time_first, (B,) * B),
        (sorted_inside, (2, 5, 3, 4)),
        (flipped, (2, 5, 3, 4)),
        (put_back, (2, 5, 3, 4)),
        (time_first, (EIGHT,) * EIGHT),
        (sorted_inside, (2, 5, 3, 4, 6, 2, 7, 1)),
        (flipped, (2, 5, 3, 4, 6, 2, 7, 1)),
        (put_back, (2, 5, 3, 4, 6, 2, 7, 1)),
    ],
)
def test_gradients_are_those_of_the_examples_whatever_the_order_of_rows(step, lengths):
    """Against the gradient of each example's own positions of the loss of the batch."""
    torch.manual_seed(0)
    module, (x, y, mask), count = mute(Module(step)).double(), sequences(*lengths), len(lengths)
    batch = x.double(), y, mask
    found = gradients_of(Forward(find_layers(module))(module, batch, count))
    for n in range(count):
        own = F.cross_entropy(module(batch[0][n]), y[n], reduction="sum") * count / mask.sum()
        torch.testing.assert_close(found[n], torch.autograd.grad(own, module.first.weight)[0])


@pytest.mark.parametrize("rearrange", [lambda part: part, lambda part: part.flip(0)])
def test_picked_rows_that_are_as_many_of_each_example_repeat(rearrange):
    """Losses without their gradients are read as those with them are, so that both can be compared."""

    def step(module, x, y, mask):
        x, y, mask = map(rearrange, (x, y, mask))
        return F.cross_entropy(module(x)[mask], y[mask])

    x, y, mask = sequences(3, 3, 3, 3)
    batch = torch.cat([x, x[:, :1]], 1), torch.cat([y, y[:, :1]], 1), F.pad(mask, (0, 1))
    module = mute(Module(step))
    plan = find_layers(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)  # that the losses differ from call to call
        values = Forward(plan)(module, batch, B).per_example().detach()
    torch.testing.assert_close(compute_losses(module, batch, B, verified=plan.verified), values)


def test_later_batches_are_read_the_same_way():
    """The second batch comes in order by chance, the third does not."""
    torch.manual_seed(0)
    module = mute(Module(sorted_inside)).double()
    forward = Forward(find_layers(module))
    for lengths in ((2, 5, 3, 4), (5, 4, 3, 2), (1, 2, 3, 4)):
        x, y, mask = sequences(*lengths)
        found = gradients_of(forward(module, (x.double(), y, mask), B))
        own = F.cross_entropy(module(x[0].double()), y[0], reduction="sum") * B / mask.sum()
        torch.testing.assert_close(found[0], torch.autograd.grad(own, module.first.weight)[0])


@pytest.mark.parametrize("first", [(3, 3), (2, 4)])
def test_layers_on_rows_that_a_mask_picked_are_exact(first):
    """Rows that are as many for each example in one batch, and not in the next: all are read in one way."""
    torch.manual_seed(0)
    module = mute(Module(packed)).double()
    forward, batches = Forward(find_layers(module)), [first, (2, 4), (3, 3), (1, 5)]
    for lengths in batches:
        x, y, mask = sequences(*lengths)
        captured = forward(module, (x.double(), y, mask), 2)
        found = gradients_of(captured)
        for n in range(2):
            kept = mask[n]
            own = F.cross_entropy(module(x[n][kept].double()), y[n][kept], reduction="sum") * 2 / mask.sum()
            expected = torch.autograd.grad(own, module.first.weight)[0]
            torch.testing.assert_close(found[n], expected)


def copies(count: int, together: bool):
    def step(module, x, y):
        def more(t):
            return t.repeat_interleave(count, 0) if together else torch.cat([t] * count)

        return F.cross_entropy(module(more(x)), more(y))

    return step


@pytest.mark.parametrize("batch", [2, 4, 5])
@pytest.mark.parametrize("count", [2, 3])
def test_copies_of_the_batch_need_not_stand_together(count, batch):
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3).double(), torch.randint(2, (batch,))
    run(copies(count, True), (x.float(), y))
    module = mute(Module(copies(count, False))).double()
    found = gradients_of(Forward(find_layers(module))(module, (x, y), batch))
    for n in range(batch):
        expected = torch.autograd.grad(
            F.cross_entropy(module(x[n : n + 1]), y[n : n + 1]), module.first.weight
        )
        torch.testing.assert_close(found[n], expected[0])


def test_nothing_is_concluded_from_random_or_failing_steps():
    def noisy(module, x, y, mask):
        return F.cross_entropy(module(x + torch.randn_like(x)).flatten(0, 1), y.flatten())

    def once(module, x, y, mask):
        if hasattr(module, "ran"):
            raise RuntimeError
        module.ran = True
        return batch_first(module, x, y, mask)

    run(once, sequences(2, 5, 3, 4))
    with pytest.warns(InfluenceWarning, match="differ from call to call"):
        run(noisy, sequences(2, 5, 3, 4))


def test_batches_in_another_order():
    x, square, text = torch.arange(3), torch.arange(9).view(3, 3), ["a", "b", "c"]
    part = {"x": (x, None), "time": square[:2], "text": text, "size": [1, 2], "ragged": [x[:1], x[:2], x]}
    found = rearranged(part, [2, 1, 0], 3)
    assert found["x"][0].tolist() == [2, 1, 0]
    assert found["time"].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert (found["text"], found["size"]) == (["c", "b", "a"], [1, 2])
    assert [len(t) for t in found["ragged"]] == [3, 2, 1]
    assert part["text"] == ["a", "b", "c"]
    assert rearranged(square, [2, 1, 0], 3).tolist() == [
        [6, 7, 8],
        [3, 4, 5],
        [0, 1, 2],
    ]  # rows, if both could be
    for unknown in (torch.zeros(5, 7), object(), {"a": {1, 2}}, torch.eye(3).to_sparse()):
        with pytest.raises(UnknownPartError):
            rearranged(unknown, [2, 1, 0], 3)


def test_positions_that_the_loss_leaves_out():
    batch = {"x": torch.zeros(4, 6, 2), "y": torch.zeros(4)}
    assert [missing_positions(batch, 4, rows) for rows in (24, 20, 12, 4)] == [0, 1, 3, 0]
