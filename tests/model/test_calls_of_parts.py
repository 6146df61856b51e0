"""Networks that are run on one example after the other, or use weights behind their layers by functions."""

import warnings

import pytest
import torch
from drive import mute
from torch import nn
from torch.nn import functional as F

from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.model.losses.output_rows import join_calls
from lightning_influence.model.uses.places import Place, reshape_place, whole
from lightning_influence.support.errors import InfluenceError, UnsupportedModelError

B = 5


class Step(nn.Module):
    """A training step on a small network, split in some way, with some loss of outputs and targets."""

    def __init__(self, split, loss, penalty=False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self._split, self._loss, self._penalty = split, loss, penalty

    def net(self, x):
        return self.last(torch.tanh(self.first(x)))

    def training_step(self, batch, batch_idx):
        x, t = batch
        loss = self._loss(torch.cat([self.net(part) for part in self._split(x)]), t)
        return loss + sum(p.square().sum() for p in self.parameters()) if self._penalty else loss


def one_by_one(x):
    return x.split(1)


def halves(x):
    return x.split((len(x) + 1) // 2)


def all_but_one(x):
    """One of the calls is on a single example, beside those on several."""
    return x[:1], x[1:3], x[3:]


def squared_sum(z, t):
    return (z - t).square().sum()


def log_cosh(z, t):
    return torch.log(torch.cosh(z - t)).mean()


def make_batch(count=B, width=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator).double()
    return x, torch.randn(count, width, generator=generator).double()


@pytest.mark.grid
@pytest.mark.parametrize("split", [one_by_one, halves])
@pytest.mark.parametrize("loss", [squared_sum, log_cosh])
@pytest.mark.parametrize("penalty", [False, True])
def test_gradients_and_curvature_of_calls_on_parts(split, loss, penalty):
    torch.manual_seed(0)
    module, (x, t) = mute(Step(split, loss, penalty)).double(), make_batch()
    forward = Forward(find_layers(module))
    captured = forward(module, (x, t), B)
    found = captured.loss_gradients()["first"].dense()[0, :, 0]
    columns = captured.curvature_gradients("exact")["first"].dense()[:, :, 0]
    weight = module.first.weight

    def alone(n, z):
        return loss(z[None], t[n : n + 1])

    for n in range(B):
        z = module.net(x[n : n + 1])[0]
        slope = torch.autograd.grad(alone(n, z), z, retain_graph=True)[0]
        J = torch.stack([torch.autograd.grad(entry, weight, retain_graph=True)[0] for entry in z])
        torch.testing.assert_close(found[n, :, :-1], torch.einsum("c,cde->de", slope, J))
        H = torch.autograd.functional.hessian(lambda z, n=n: alone(n, z), z.detach())
        flat, rows = J.flatten(1), columns[:, n, :, :-1].flatten(1)
        torch.testing.assert_close(rows.T @ rows, flat.T @ H @ flat)


@pytest.mark.parametrize("split", [one_by_one, halves, all_but_one])
def test_inputs_of_calls_on_parts_have_the_positions_of_one(split):
    """Factors are means over the positions, of which no example has more than in one call."""
    torch.manual_seed(0)
    module, (x, t) = mute(Step(split, F.mse_loss)).double(), make_batch()
    captured = Forward(find_layers(module))(module, (x, t), B)
    inputs = captured.recorder.inputs(B)["first"]
    torch.testing.assert_close(inputs[0, :, 0, :-1], x)
    assert inputs.shape == (1, B, 1, 4)


def test_calls_are_joined_where_they_have_other_examples():
    a, b = torch.zeros(2, 3), torch.zeros(1, 3)
    [joined] = join_calls([a, b], [Place(0, owners=(0, 2)), whole(1)], ["head", "head"], 3)
    assert joined.members == (0, 1)
    assert joined.place == Place(0, owners=(0, 2, 1))
    assert joined.split([a, b + 1], 3).tolist() == [[[0.0] * 3], [[1.0] * 3], [[0.0] * 3]]
    for places, names in (
        ([Place(0, owners=(0, 1)), whole(1)], ["head", "head"]),  # one example in both
        ([Place(0, owners=(0, 2)), whole(1)], ["head", "other"]),
        ([None, None], ["head", "head"]),
    ):
        assert len(join_calls([a, b], places, names, 3)) == 2


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(F.linear(x, self.first.weight, self.first.bias))
        return self.head(h) + F.linear(h.square(), self.head.weight)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Functional()

    def training_step(self, batch, batch_idx):
        x, t = batch
        e = self.net(x) - t
        loss = torch.maximum(0.3 * e, -0.7 * e).mean()
        return loss + sum(p.square().sum() for p in self.parameters())


@pytest.mark.parametrize("size", [1, 2])
def test_weights_that_functions_use_behind_the_layers_are_inside_the_outputs(size):
    """A loss that is linear in the outputs, so that no second derivative shows the use; and a penalty."""
    torch.manual_seed(0)
    module, (x, t) = mute(Around()).double(), make_batch()
    forward = Forward(find_layers(module))
    for start in range(0, 4, size):
        rows = slice(start, start + size)
        found = forward(module, (x[rows], t[rows]), size).loss_gradients()
        for place, n in enumerate(range(start, start + size)):
            e = module.net(x[n : n + 1]) - t[n : n + 1]
            loss = torch.maximum(0.3 * e, -0.7 * e).mean()
            for name in ("net.first", "net.head"):
                layer = module.get_submodule(name)
                weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias], retain_graph=True)
                expected = torch.cat([weight, bias[:, None]], 1)
                torch.testing.assert_close(found[name].dense()[0, place, 0], expected)


class InPlace(nn.Module):
    """Rows in another order, and an operation in place on what a layer of sequences has made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        order = x.flatten(1).sum(1).argsort()
        z = self.last(torch.relu_(self.first(x[order])))
        return F.cross_entropy(z.mean(1), y[order])


def test_outputs_that_are_changed_in_place_are_found_where_rows_are_followed():
    torch.manual_seed(0)
    module, x, y = mute(InPlace()).double(), torch.randn(4, 3, 3).double(), torch.tensor([0, 1, 1, 0])
    forward = Forward(find_layers(module))
    for order in (x.flatten(1).sum(1).argsort(), torch.arange(4)):  # in order by chance, and not
        captured = forward(module, (x[order], y[order]), 4)
        found = captured.loss_gradients()["first"].dense()[0, :, 0, :, :-1]
        for place, n in enumerate(order.tolist()):
            own = F.cross_entropy(module.last(torch.relu(module.first(x[n : n + 1]))).mean(1), y[n : n + 1])
            torch.testing.assert_close(found[place], torch.autograd.grad(own, module.first.weight)[0])


def test_slices_in_any_order_are_followed_through_folding_and_unfolding():
    """As heads of attention are folded with the examples and taken apart again."""
    folded = reshape_place(Place(1, owners=(0, 2, 1)), torch.Size((4, 3, 4)), torch.Size((4, 6, 2)), 3)
    assert folded == Place(1, owners=(0, 0, 2, 2, 1, 1))
    apart = reshape_place(folded.moved(0), torch.Size((6, 4, 2)), torch.Size((3, 2, 4, 2)), 3)
    assert apart == Place(0, owners=(0, 2, 1))
    assert reshape_place(Place(0, owners=(0, 2, 1)), torch.Size((3, 4)), torch.Size((4, 3)), 3) is None


def contrast(z, t):
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def neighbours(z, t):
    return F.cross_entropy(z + 0.3 * z.roll(1, 0), (t[:, 0] > 9).long())


def first_half_more(z, t):
    half, losses = (len(z) + 1) // 2, (z - t).square().sum(1)
    return 0.7 * losses[:half].sum() + 0.3 * losses[half:].sum()


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", [contrast, neighbours, first_half_more])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("is_zero", [False, True])
def test_coupled_losses_are_refused_in_small_batches_and_before_a_head_of_zeros(loss, count, is_zero):
    torch.manual_seed(0)
    module = mute(Step(lambda x: [x], loss)).double()
    if is_zero:
        nn.init.zeros_(module.last.weight)
    forward, batch = Forward(find_layers(module)), make_batch(count)
    with pytest.raises(UnsupportedModelError):
        forward(module, batch, count)


class Bare(nn.Module):
    """Which rows of the loss are whose is not known: each example is run alone, a penalty with it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 3))

    def own(self, x, t):
        return (x @ self.linear + (x @ self.square * x).sum(1) - t[:, 0]).square().mean()

    def training_step(self, batch, batch_idx):
        return self.own(*batch) + sum(p.square().sum() for p in self.parameters())


def test_penalties_are_no_part_of_examples_that_are_run_one_by_one():
    torch.manual_seed(0)
    module, (x, t) = mute(Bare()).double(), make_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Forward(find_layers(module))(module, (x, t), B).loss_gradients()
    for n in range(B):
        loss = module.own(x[n : n + 1], t[n : n + 1])
        for name, p in module.named_parameters():
            expected = torch.autograd.grad(loss, p, retain_graph=True)[0]
            torch.testing.assert_close(found[name].dense()[0, n].reshape(p.shape), expected)


def test_the_order_of_queries_is_seen_where_training_batches_hold_one_example():
    torch.manual_seed(0)
    module = mute(Step(lambda x: [x.flip(0)], lambda z, t: F.mse_loss(z, t.flip(0)))).double()
    x, t = make_batch()
    train = [(x[n : n + 1], t[n : n + 1]) for n in range(B)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forward = Forward(find_layers(module))
            for batch in train:
                forward(module, batch, 1)
            captured = forward(module, (x, t), B)
    except InfluenceError as error:
        pytest.fail(f"refused: {error}")
    values = F.mse_loss(module.net(x), t, reduction="none").mean(1)
    torch.testing.assert_close(captured.per_example(), values)


@pytest.mark.parametrize("split", [one_by_one, halves, all_but_one])
def test_rows_that_only_fill_up_are_no_inputs_of_examples_in_other_calls(split):
    """Of convolutions, whose inputs of absent examples are filled up with those of others."""
    torch.manual_seed(0)
    module = mute(Step(split, F.mse_loss)).double()
    module.first = nn.Sequential(nn.Conv1d(1, 4, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten()).double()
    module.net = lambda x: module.last(torch.tanh(module.first(x[:, None])))
    x, t = make_batch()
    captured = Forward(find_layers(module))(module, (x, t), B)
    found, conv = captured.loss_gradients()["first.0"].dense()[0, :, 0, :, :-1], module.first[0]
    for n in range(B):
        loss = F.mse_loss(module.net(x[n : n + 1]), t[n : n + 1])
        expected = torch.autograd.grad(loss, conv.weight)[0].flatten(1)
        torch.testing.assert_close(found[n], expected)
    patches = torch.stack([x[:, :-1], x[:, 1:]], 2)
    torch.testing.assert_close(captured.recorder.inputs(B)["first.0"][0, :, :, :-1], patches)
