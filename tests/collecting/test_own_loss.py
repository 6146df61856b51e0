"""A loss that the user gave to the callback is compared with the step's, and what it moves is put back."""

import collections
import random
import warnings

import numpy as np
import pytest
import torch
from callback_models import Classifier, fit, loader, same
from torch import nn
from torch.nn import functional

from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.collecting.own_loss import OwnLoss
from lightning_influence.support.errors import InfluenceWarning, UnsupportedModelError


class Plain(Classifier):
    def on_fit_end(self):
        self.draws = torch.get_rng_state()


def losses(module, batch):
    return functional.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def minus(module, batch):
    return -losses(module, batch)


def minus_mean(module, batch):
    return -functional.cross_entropy(module.net(batch[0]), batch[1])


def same_value(module, batch):
    """The value of the step's loss with the gradient of another."""
    other = module.net(batch[0]).square().mean(1)
    return other - other.detach() + losses(module, batch).detach()


def absolute(module, batch):
    return module.net(batch[0]).abs().mean(1)


def run(make, *callbacks):
    module = make()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        host = fit(module, *callbacks)
    return module, host, [str(w.message) for w in record if issubclass(w.category, InfluenceWarning)]


def check_unchanged(make, callback):
    plain, other, _ = run(make)
    module, host, said = run(make, callback)
    assert same(dict(module.state_dict()), dict(plain.state_dict()))
    assert same(host.optimizers[0].state_dict(), other.optimizers[0].state_dict())
    assert torch.equal(module.draws, plain.draws)
    for own, expected in zip(module.parameters(), plain.parameters(), strict=True):
        assert same(own.grad, expected.grad)
    assert torch.overrides._len_torch_function_stack() == 0
    return module, said


REFUSED = {
    minus: "`loss=` goes against the training loss of the first batch (gradients of cosine -1)",
    minus_mean: "What `loss=` returns cannot be collected from.",
}


@pytest.mark.grid
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("loss", [losses, minus, minus_mean, same_value, absolute])
def test_another_loss_is_told_and_minus_the_loss_refused(loss, p):
    callback = InfluenceCallback(every_n_steps=1, loss=loss)
    _, said = check_unchanged(lambda: Plain(p=p), callback)
    stopped = [text for text in said if text.startswith("Nothing is collected during this fit: ")]
    assert callback.num_collected == (0 if loss in REFUSED else 20)
    assert len(stopped) == (loss in REFUSED)
    if stopped:
        assert REFUSED[loss] in stopped[0]
    told = [text for text in said if "`loss=` is not the loss of `training_step`" in text]
    assert len(told) == (loss in (same_value, absolute) and not p)  # other draws turn gradients as well
    assert not any("the values of `influence_loss`" in text for text in said)


def test_strict_raises_for_minus_the_loss():
    with pytest.raises(UnsupportedModelError, match="goes against the training loss"):
        fit(Plain(p=0.0), InfluenceCallback(every_n_steps=1, loss=minus, strict=True))


class MinusHook(Plain):
    def influence_loss(self, batch):
        return minus(self, batch)


def test_a_hook_is_compared_too():
    callback = InfluenceCallback(every_n_steps=1)
    _, said = check_unchanged(MinusHook, callback)
    assert any("`influence_loss` goes against the training loss" in text for text in said)
    assert callback.num_collected == 0


def test_gradients_are_compared_once(monkeypatch):
    compared, real = [], OwnLoss.compare_gradients

    def count(self, *args):
        compared.append(1)
        real(self, *args)

    monkeypatch.setattr(OwnLoss, "compare_gradients", count)
    fit(Plain(), InfluenceCallback(every_n_steps=1, loss=losses))
    assert len(compared) == 1


class Turns(Plain):
    """Two backward passes a step, the first of which is of another loss than the user's own."""

    def __init__(self):
        super().__init__(p=0.0)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.manual_backward(-0.1 * loss, retain_graph=True)
        self.manual_backward(loss)
        optimizer.step()


def test_of_several_backward_passes_none_is_taken_for_the_training():
    callback = InfluenceCallback(every_n_steps=1, loss=losses)
    check_unchanged(Turns, callback)
    assert callback.num_collected == 20


class Counting(Plain):
    """A hook on a gradient, which has to run once a step."""

    def __init__(self):
        super().__init__(p=0.0)
        self.ran = 0

    def training_step(self, batch, batch_idx):
        outputs = self.net(batch[0])
        outputs.register_hook(self.count)
        return functional.cross_entropy(outputs, batch[1])

    def count(self, grad):
        self.ran += 1
        return grad * (1 + 0.1 * self.ran)


def test_hooks_on_gradients_run_as_often_as_without():
    module, _ = check_unchanged(Counting, InfluenceCallback(every_n_steps=1, loss=losses))
    assert module.ran == 20


class Noisy(Plain):
    """A loss of the user's that draws from, or counts in, what the module holds, as the step does."""

    def __init__(self, source):
        super().__init__()
        self.source = {
            "torch": torch.Generator().manual_seed(0),
            "numpy": np.random.default_rng(0),
            "python": random.Random(0),
            "counter": collections.Counter(),
        }[source]

    def noise(self):
        if isinstance(self.source, torch.Generator):
            return torch.rand((), generator=self.source)
        if isinstance(self.source, collections.Counter):
            self.source["calls"] += 1
            return self.source["calls"] % 7 / 7
        return self.source.random()

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.net(batch[0] + self.noise()), batch[1])


def noisy_losses(module, batch):
    return losses(module, (batch[0] + module.noise(), batch[1]))


@pytest.mark.grid
@pytest.mark.parametrize("source", ["torch", "numpy", "python", "counter"])
@pytest.mark.parametrize("is_hook", [False, True])
def test_what_a_loss_draws_or_counts_does_not_reach_the_fit(source, is_hook):
    class Hooked(Noisy):
        if is_hook:
            influence_loss = noisy_losses

    callback = InfluenceCallback(every_n_steps=1, loss=None if is_hook else noisy_losses)
    module, said = check_unchanged(lambda: Hooked(source), callback)
    assert callback.num_collected == 20
    assert said == []
    if source == "counter":
        assert module.source["calls"] == 20


class Lazy(Plain):
    def __init__(self):
        super().__init__(p=0.0)
        self.net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))


def test_lazy_modules_are_told_in_words():
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        ends = []
        for callbacks in ([], [InfluenceCallback(every_n_steps=1)]):
            torch.manual_seed(0)
            module = Lazy()
            fit(module, *callbacks, data=loader(), seed=0)
            ends.append(dict(module.state_dict()))
    assert same(*ends)
    told = [str(w.message) for w in record if "Nothing is collected" in str(w.message)]
    assert len(told) == 1
    assert "The shapes of 'net.0', 'net.2' are not known before the first batch" in told[0]
