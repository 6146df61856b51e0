"""Losses that no single batch shows to be odd, or that torch does not differentiate as needed."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_influence import InfluenceModule
from lightning_influence.support.errors import InfluenceWarning, UnsupportedModelError

generator = torch.Generator().manual_seed(0)
N, C = 11, 3
X = torch.randn(N, 4, generator=generator, dtype=torch.float64)
Y = torch.randint(C, (N,), generator=generator)


class Odd(LightningModule):
    def __init__(self, step):
        super().__init__()
        self.body, self.head, self.step = nn.Linear(4, 5).double(), nn.Linear(5, C).double(), step

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch, batch_idx):
        return self.step(self, *batch)


def scores(step, size=4):
    batches = [(X[at : at + size], Y[at : at + size]) for at in range(0, N, size)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = Odd(step)
        found = InfluenceModule(module).scores(batches, batches, method="identity").scores
    told = " ".join(str(w.message) for w in caught if issubclass(w.category, InfluenceWarning))
    return module, found, told


def expected(module, example):
    parameters = list(module.parameters())
    rows = [
        torch.cat([
            g.flatten() for g in torch.autograd.grad(example(module, X[n : n + 1], Y[n : n + 1]), parameters)
        ])
        for n in range(N)
    ]
    return torch.stack(rows) @ torch.stack(rows).T / N


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (lambda m, x, y: F.cross_entropy(m(x), y) * len(x), 1),
        (lambda m, x, y: F.cross_entropy(m(x), y) * len(x) / 100, 0.01),
        (lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum") * (1 / len(x)), 1),
    ],
)
def test_factors_that_go_with_the_size_of_the_batch_make_sums_and_means(step, factor):
    """Read by their values, as factors of single batches do not show that."""
    module, found, told = scores(step)
    torch.testing.assert_close(found, expected(module, lambda m, x, y: factor * F.cross_entropy(m(x), y)))
    assert not told


def test_a_factor_of_the_users_own_is_one():
    module, found, told = scores(lambda m, x, y: 4 * F.cross_entropy(m(x), y))
    torch.testing.assert_close(found, expected(module, lambda m, x, y: 4 * F.cross_entropy(m(x), y)))
    assert not told


def test_class_weights_of_the_batch_are_told():
    weigh = lambda y: 1 / (1 + torch.bincount(y, minlength=C).double())  # noqa: E731
    *_, told = scores(lambda m, x, y: F.cross_entropy(m(x), y, weight=weigh(y)))
    assert "class weights of the training loss differ from batch to batch" in told


def test_losses_of_the_easiest_examples_are_refused_whatever_the_halves():
    def step(m, x, y):
        losses = -m(x).log_softmax(1).gather(1, y[:, None])[:, 0]
        return losses.sort().values[: (len(x) + 1) // 2].mean()

    for size in range(2, N + 1):
        with pytest.raises(UnsupportedModelError, match="what one example adds depends on the others"):
            scores(step, size)


def test_a_loss_without_second_derivatives_has_its_own_gradients():
    module, found, told = scores(lambda m, x, y: F.multi_margin_loss(m(x), y))
    torch.testing.assert_close(found, expected(module, lambda m, x, y: F.multi_margin_loss(m(x), y)))
    assert "no second derivatives" in told


def test_gradient_penalties_are_refused():
    def step(m, x, y):
        x = x.clone().requires_grad_()
        z = m(x)
        return F.cross_entropy(z, y) + torch.autograd.grad(z.sum(), x, create_graph=True)[0].square().mean()

    with pytest.raises(UnsupportedModelError, match="differentiates the model's outputs"):
        scores(step)


def test_batches_in_dataclasses_are_taken_apart():
    """A sum in an unnamed loss shows by parts of a batch only."""

    @dataclass
    class Batch:
        x: torch.Tensor
        y: torch.Tensor

    def step(m, batch):
        return -m(batch.x).log_softmax(1).gather(1, batch.y[:, None]).sum()

    module = Odd(lambda m, x, y: None)
    module.training_step = lambda batch, batch_idx: step(module, batch)
    batches = [Batch(X[at : at + 4], Y[at : at + 4]) for at in range(0, N, 4)]
    found = InfluenceModule(module).scores(batches, batches, method="identity").scores
    torch.testing.assert_close(found, expected(module, lambda m, x, y: step(m, Batch(x, y))))


class Drawn(nn.Linear):
    """A layer whose weights are drawn around their means, with a buffer of what was drawn."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, dtype=torch.float64)
        self.spread = nn.Parameter(torch.full((outputs, inputs), 0.1, dtype=torch.float64))
        self.register_buffer("noise", torch.randn(outputs, inputs, dtype=torch.float64))

    def forward(self, x):
        return F.linear(x, self.weight + self.noise * self.spread.exp(), self.bias)


def surprise(z, y):
    return -z.log_softmax(1).gather(1, y[:, None]).mean()


class Bound(nn.Module):
    """The loss of a network, which it calls itself, and a divergence of all its weights, of shape (1,)."""

    def __init__(self, net, divergence):
        super().__init__()
        self.net, self.divergence = net, divergence

    def forward(self, x, y):
        total = torch.zeros(1, dtype=torch.float64)
        total += surprise(self.net(x), y)
        total += 1e-2 * self.divergence()
        return total


class Divergence(nn.Module):
    def __init__(self, net, size):
        super().__init__()
        self.net, self.size = net, size

    def forward(self):
        parts = [p.square().mean() + p.exp().mean() for p in self.net.parameters()]
        return torch.stack(parts).sum().expand(self.size)


@pytest.mark.parametrize("size", [1, 4])  # of the latter as many as examples
def test_what_a_module_makes_of_weights_alone_holds_no_examples(size):
    def step(m, x, y):
        return m.bound(x, y).mean()

    net = nn.Sequential(Drawn(4, 5), nn.Tanh(), Drawn(5, C))
    module = Odd(step)
    del module.body, module.head
    module.net, module.bound = net, Bound(net, Divergence(net, size))
    if size > 1:
        module.bound.forward = lambda x, y: surprise(net(x), y) + 1e-2 * module.bound.divergence().mean()
    batches = [(X[at : at + 4], Y[at : at + 4]) for at in range(0, N, 4)]
    found = InfluenceModule(module).scores(batches, batches, method="identity")
    assert found.diagnostics.parameters_covered == 1
    own = expected(module, lambda m, x, y: surprise(net(x), y))
    torch.testing.assert_close(found.scores, own)


def test_a_loss_of_two_views_that_couples_examples_is_not_asked_for_another_order():
    def step(m, x, y):
        views = F.normalize(m(torch.cat([x, x + 0.1 * x.roll(1, 1)])))
        alike = (views @ views.T).fill_diagonal_(-1e9)
        return F.cross_entropy(alike, torch.arange(2 * len(x)).roll(len(x)))

    with pytest.raises(UnsupportedModelError, match="what one example adds depends on the others"):
        scores(step)
