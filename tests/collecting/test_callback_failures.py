"""What fails while collecting ends no training: it goes on to the last bit as without the callback."""

from __future__ import annotations

import warnings

import pytest
import torch
from callback_models import Classifier, fit, loader, same
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.collecting.sums import WindowSums
from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.support.errors import InfluenceWarning


class Routed(Classifier):
    """An expert sees some of the examples, from one step on."""

    first, rows = 0, 2

    def __init__(self) -> None:
        super().__init__("adam")
        self.expert = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        outputs, chosen = self.net(batch[0]), torch.arange(self.rows)
        if self.global_step >= self.first:
            outputs = outputs.index_add(0, chosen, self.expert(batch[0][chosen]))
        return functional.cross_entropy(outputs, batch[1])


class RoutedLater(Routed):
    first = 13


class RoutedNowhere(Routed):
    rows = 0


class Reentrant(Classifier):
    def forward(self, x):
        hidden = self.net[0](x)
        middle = nn.Sequential(nn.Tanh(), self.net[2])
        return self.net[3](
            checkpoint(middle, hidden, use_reentrant=True) if self.training else middle(hidden)
        )

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])


class WholeReentrant(Classifier):
    def training_step(self, batch, batch_idx):
        outputs = checkpoint(self.net, batch[0].requires_grad_(), use_reentrant=True)
        return functional.cross_entropy(outputs, batch[1])


class HookOfOneNumber(Classifier):
    def influence_loss(self, batch):
        return functional.cross_entropy(self.net(batch[0]), batch[1])


class HookThatFails(Classifier):
    def influence_loss(self, batch):
        torch.rand(3)
        raise KeyError("weights")


class Pair:
    """A batch of a class of the user's, in which no tensor is found."""

    def __init__(self, rows) -> None:
        x, y = (torch.stack(parts) for parts in zip(*rows, strict=True))
        self.read = lambda: (x, y)


class OfPairs(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch.read(), batch_idx)


def pairs() -> DataLoader:
    return DataLoader(loader().dataset, 8, shuffle=True, collate_fn=Pair)


def said(record) -> list[str]:
    """Warnings that something is not collected."""
    found = [str(w.message) for w in record if issubclass(w.category, InfluenceWarning)]
    return [message for message in found if "collected" in message or "left out of" in message]


def check_uncollected(callback: InfluenceCallback) -> None:
    assert callback.num_collected == 0
    assert not callback.factors.layers
    assert callback.record is None
    assert callback.influence_state.factors is None


def check_as_without(module_class: type[Classifier], callback: InfluenceCallback, data=loader) -> list[str]:
    """Fit with and without the callback to the same end, and return what was said."""
    module, plain = module_class(), module_class()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        host = fit(module, callback, data=data())
    other = fit(plain, data=data())
    assert same(dict(module.state_dict()), dict(plain.state_dict()))
    assert same(host.optimizers[0].state_dict(), other.optimizers[0].state_dict())
    for own, expected in zip(module.parameters(), plain.parameters(), strict=True):
        assert same(own.grad, expected.grad)
    assert all(not part._forward_hooks for part in module.modules())
    assert torch.overrides._len_torch_function_stack() == 0
    return said(record)


@pytest.mark.parametrize(
    ("module_class", "reason"),
    [
        (Routed, "Layer 'expert' was called with a tensor of shape (2, 6) in a batch of 8 examples"),
        (RoutedLater, "Layer 'expert' was called with a tensor of shape (2, 6) in a batch of 8 examples"),
        (
            Reentrant,
            "RuntimeError: When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad()",
        ),
        (WholeReentrant, "No covered layer took part in the training step"),
        (HookOfOneNumber, "ValueError: influence_loss(batch) returned shape (). Accepted is"),
        (HookThatFails, "KeyError: 'weights'."),
        (OfPairs, "No batch size can be read from a batch of type Pair."),
    ],
)
def test_training_goes_on_and_the_reason_is_given_once(module_class, reason) -> None:
    callback = InfluenceCallback(every_n_steps=1)
    told = check_as_without(module_class, callback, pairs if module_class is OfPairs else loader)
    assert len(told) == 1, told
    assert told[0].startswith(f"Nothing is collected during this fit: {reason}")
    assert "Training goes on as without the callback, and factors will be fitted in a pass" in told[0]
    assert ("What was collected before is dropped" in told[0]) == (module_class is RoutedLater)
    check_uncollected(callback)


def test_an_expert_that_no_example_is_sent_to_stops_nothing() -> None:
    callback = InfluenceCallback(every_n_steps=1)
    assert check_as_without(RoutedNowhere, callback) == []
    assert callback.num_collected > 0


@pytest.mark.parametrize(
    ("owner", "name", "dropped"), [(WindowSums, "set_bases", 4), (TrainingRecord, "add_step", 1)]
)
def test_errors_outside_the_capture_stop_collecting_too(monkeypatch, owner, name, dropped) -> None:
    counts = []

    def fail(*args, **kwargs) -> None:
        counts.append(callback.num_collected)
        raise MemoryError("no room\nfor details")

    monkeypatch.setattr(owner, name, fail)
    callback = InfluenceCallback(every_n_steps=1)
    told = check_as_without(Classifier, callback)
    assert counts == [dropped]
    assert len(told) == 1
    assert told[0].startswith("Nothing is collected during this fit: MemoryError: no room. Training goes on")
    check_uncollected(callback)


def test_factors_are_fitted_when_asked_after_a_fit_that_could_not_be_collected() -> None:
    callback, module = InfluenceCallback(every_n_steps=1), Reentrant()
    with pytest.warns(InfluenceWarning, match="Nothing is collected"):
        host = fit(module, callback)
    result = host.influence(module, loader(), loader(8), method="ekfac", log=False)
    assert torch.isfinite(result.scores).all()
    assert callback.influence_state.factors.origin == "pass"


def test_checkpoint_of_a_fit_that_stopped_collecting_holds_nothing_of_it(tmp_path) -> None:
    callback = InfluenceCallback(every_n_steps=1)
    with pytest.warns(InfluenceWarning, match="Nothing is collected"):
        host = fit(RoutedLater(), callback)
    host.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["InfluenceCallback"]
    again = InfluenceCallback()
    again.load_state_dict(state)
    check_uncollected(again)


def test_next_fit_is_collected_again() -> None:
    callback = InfluenceCallback(every_n_steps=1)
    with pytest.warns(InfluenceWarning, match="Nothing is collected"):
        fit(RoutedLater(), callback)
    fit(Classifier(), callback, max_epochs=2)
    assert callback.num_collected == 10
    assert callback.factors.has_squares


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_end_the_fit_also_while_collecting(error) -> None:
    class Interrupted(Classifier):
        def influence_loss(self, batch):
            raise error

    module = Interrupted()
    with pytest.raises((error, SystemExit)):
        fit(module, InfluenceCallback(every_n_steps=1))
    assert all(not part._forward_hooks for part in module.modules())


def test_errors_of_the_users_backward_pass_are_raised() -> None:
    class Broken(Classifier):
        def backward(self, loss) -> None:
            raise ValueError("the user's own")

    with pytest.raises(ValueError, match="the user's own"):
        fit(Broken(), InfluenceCallback(every_n_steps=1))
