"""Losses and margins of examples from a step's own call of a loss function, against one at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_influence.model.live.example_losses import HeldStep, LossWatch
from lightning_influence.model.losses import capture
from lightning_influence.support.errors import LossCaptureError

B, C, T = 5, 4, 3


class Setting:
    """A network, a batch, and how the step makes its loss of them."""

    def __init__(self, step, targets, rows=(B, 6), outputs=C):
        self.step, self.targets = step, targets
        self.net, self.inputs = nn.Linear(rows[-1], outputs).double(), torch.randn(*rows).double()

    def loss(self, rows=slice(None)):
        return self.step(self.net(self.inputs[rows]), self.targets[rows])


def labels(*shape):
    return torch.randint(C, shape)


def tokens(outputs, targets, **options):
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), **options)


def with_ignored():
    targets = labels(B, T)
    targets[0, 1:] = targets[2, 0] = -100
    return targets


WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0]).double()
CASES = {
    "cross-entropy": lambda: Setting(functional.cross_entropy, labels(B)),
    "sum": lambda: Setting(lambda f, y: functional.cross_entropy(f, y, reduction="sum"), labels(B)),
    "mean of none": lambda: Setting(
        lambda f, y: functional.cross_entropy(f, y, reduction="none").mean(), labels(B)
    ),
    "class weights": lambda: Setting(lambda f, y: functional.cross_entropy(f, y, weight=WEIGHTS), labels(B)),
    "scaled": lambda: Setting(lambda f, y: 0.3 * functional.cross_entropy(f, y), labels(B)),
    "module": lambda: Setting(nn.CrossEntropyLoss(label_smoothing=0.1), labels(B)),
    "tokens": lambda: Setting(tokens, labels(B, T), (B, T, 6)),
    "tokens, ignored": lambda: Setting(tokens, with_ignored(), (B, T, 6)),
    "nll": lambda: Setting(lambda f, y: functional.nll_loss(f.log_softmax(-1), y), labels(B)),
    "logistic": lambda: Setting(
        functional.binary_cross_entropy_with_logits, torch.randint(2, (B, C)).double()
    ),
    "squares": lambda: Setting(functional.mse_loss, torch.randn(B, C).double()),
}


def watch(setting, watcher=None):
    watcher = watcher or LossWatch()
    watcher.open()
    loss = setting.loss()
    found = watcher.take(loss, B)
    return watcher.read_held([found]) if isinstance(found, HeldStep) else found


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_examples_alone(name):
    setting, watcher = CASES[name](), LossWatch()
    expected = torch.stack([setting.loss(slice(n, n + 1)).detach() for n in range(B)])
    for _ in range(3):  # the second time, known calls are not traced any more
        found = watch(setting, watcher)
        assert found.losses.dtype == torch.float32
        torch.testing.assert_close(found.losses.double(), expected, rtol=1e-6, atol=1e-6)
        assert not found.losses.requires_grad
    assert not watcher.is_open
    assert torch.overrides._len_torch_function_stack() == 0
    assert watcher.excess is None or float(watcher.excess) <= 0


def margins_by_hand(setting):
    rows = []
    for n in range(B):
        outputs = setting.net(setting.inputs[n]).detach().reshape(-1, C)
        values = []
        for row, label in zip(outputs.tolist(), setting.targets[n].reshape(-1).tolist(), strict=True):
            if label != -100:
                values.append(row[label] - max(v for c, v in enumerate(row) if c != label))
        rows.append(sum(values) / len(values))
    return torch.tensor(rows)


@pytest.mark.parametrize("name", ["cross-entropy", "class weights", "tokens", "tokens, ignored", "scaled"])
def test_margins_are_logits_of_the_label_less_the_best_other(name):
    setting = CASES[name]()
    found = watch(setting)
    torch.testing.assert_close(found.margins, margins_by_hand(setting), rtol=1e-5, atol=1e-5)
    if setting.targets.ndim == 1:
        right = setting.net(setting.inputs).argmax(-1) == setting.targets
        assert torch.equal(found.margins > 0, right)


def test_margins_of_log_probabilities_are_those_of_logits():
    setting = CASES["nll"]()
    torch.testing.assert_close(watch(setting).margins, margins_by_hand(setting), rtol=1e-5, atol=1e-5)


def test_margins_of_logits_are_signed_by_the_label_and_squares_have_none():
    setting = CASES["logistic"]()
    signed = (2 * setting.targets - 1) * setting.net(setting.inputs).detach()
    torch.testing.assert_close(watch(setting).margins, signed.mean(1).float())
    assert watch(CASES["squares"]()).margins is None


def test_an_example_without_any_weight_is_not_known():
    setting = CASES["tokens, ignored"]()
    setting.targets[3] = -100
    losses = watch(setting).losses
    assert bool(losses[3].isnan())
    assert bool(losses[[0, 1, 2, 4]].isfinite().all())


def test_known_calls_are_not_traced_again_and_others_are(monkeypatch):
    traced = []
    resolve = capture.LossCapture.resolve
    monkeypatch.setattr(
        capture.LossCapture, "resolve", lambda self, *a, **k: traced.append(1) or resolve(self, *a, **k)
    )
    watcher, setting = LossWatch(), CASES["cross-entropy"]()
    for _ in range(4):
        watch(setting, watcher)
    assert len(traced) == 1
    for _ in range(2):
        watch(CASES["squares"](), watcher)
    assert len(traced) == 2
    scaled = LossWatch()
    for _ in range(2):
        watch(CASES["scaled"](), scaled)
    assert len(traced) == 4, "a factor is looked up each time"
    watch(CASES["scaled"](), watcher)
    assert float(watcher.excess) > 0, "a call that was whole before and has a factor now passed"


@pytest.mark.parametrize("name", ["cross-entropy", "sum", "tokens, ignored", "logistic", "squares", "module"])
def test_steps_that_are_held_and_read_together_are_read_as_alone(name):
    """Copies are held: what the step does to its tensors afterwards is nothing to them."""
    settings = [CASES[name]() for _ in range(3)]
    for setting in settings:
        setting.net = settings[0].net
    expected = [watch(setting) for setting in settings]  # each by a watch that traces its graph
    watcher, held = LossWatch(), []
    watch(settings[0], watcher)
    for setting in settings:
        watcher.open()
        held.append(watcher.take(setting.loss(), B))
        setting.targets.zero_()
    assert all(isinstance(step, HeldStep) for step in held)
    assert len({step.kind for step in held}) == 1
    found = watcher.read_held(held)
    assert torch.equal(found.losses, torch.cat([one.losses for one in expected]))
    if found.margins is not None:
        assert torch.equal(found.margins, torch.cat([one.margins for one in expected]))
    assert watcher.excess is None or float(watcher.excess) <= 0
    assert name != "module" or watcher.excess is not None, "no node says all of it: values are compared"


def test_large_steps_are_read_at_once():
    setting = Setting(functional.mse_loss, torch.randn(B, 5000).double(), (B, 6), 5000)
    watcher = LossWatch()
    watch(setting, watcher)
    watcher.open()
    assert not isinstance(watcher.take(setting.loss(), B), HeldStep)


def test_a_part_that_comes_later_is_noticed_by_the_value():
    factor, smoothed = [0.0], nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(outputs, targets):
        return smoothed(outputs, targets) + factor[0] * outputs.square().mean()

    watcher, setting = LossWatch(), Setting(smoothed, labels(B))
    watch(setting, watcher)
    watch(setting, watcher)
    assert float(watcher.excess) <= 0
    factor[0], setting.step = 1.0, step
    watch(setting, watcher)
    assert float(watcher.excess) > 0
    watcher.distrust()
    with pytest.raises(LossCaptureError):
        watch(setting, watcher)


def test_a_penalty_on_weights_is_left_out():
    setting = CASES["cross-entropy"]()
    expected = watch(setting).losses
    plain = setting.step
    setting.step = lambda f, y: plain(f, y) + 0.1 * setting.net.weight.square().sum()
    torch.testing.assert_close(watch(setting).losses, expected)


def test_what_cannot_be_seen_is_an_error_and_leaves_nothing_open():
    watcher = LossWatch()
    setting = Setting(lambda f, y: (f - y).square().mean(), torch.randn(B, C).double())
    with pytest.raises(LossCaptureError, match="no loss function was seen"):
        watch(setting, watcher)
    assert torch.overrides._len_torch_function_stack() == 0
    assert watch(CASES["cross-entropy"](), watcher).losses.shape == (B,)


def test_nothing_of_the_step_is_changed():
    setting = CASES["cross-entropy"]()
    plain = torch.autograd.grad(setting.loss(), setting.net.parameters())
    draws = torch.get_rng_state()
    watcher = LossWatch()
    for _ in range(2):
        watcher.open()
        loss = setting.loss()
        watcher.take(loss, B)
        gradients = torch.autograd.grad(loss, setting.net.parameters())
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients, strict=True))
    assert torch.equal(draws, torch.get_rng_state())
