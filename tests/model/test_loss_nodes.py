"""Loss calls that are read off their nodes: equal to those seen, and given up where a step changes."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_influence.model.live.example_losses import HeldStep, LossWatch
from lightning_influence.support.errors import LossCaptureError

B, C = 6, 4
pytestmark = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell whether hooks pack what operations save: every step is watched",
)


class Steps:
    """Steps of a network whose weights change between them."""

    def __init__(self, step, targets):
        self.net, self.step, self.targets = nn.Linear(5, C).double(), step, targets
        self.inputs, self.watch = torch.randn(B, 5).double(), LossWatch()

    def run(self, divisor=1.0, step=None):
        with torch.no_grad():
            self.net.weight += 0.1
        self.watch.open((self.inputs, self.targets), B)
        entered = torch.overrides._len_torch_function_stack() > 0
        outputs = self.net(self.inputs)
        loss = (step or self.step)(outputs, self.targets) / divisor
        found = self.watch.take(loss, B, divisor)
        loss.backward()
        if isinstance(found, HeldStep):
            found = self.watch.read_held([found])
        return entered, found, outputs.detach()


def labels():
    return torch.randint(C, (B,))


def ignoring():
    return torch.tensor([0, -100, 2, 3, 1, -100])


LOSSES = {
    "cross-entropy": (functional.cross_entropy, labels),
    "ignored": (functional.cross_entropy, ignoring),
    "sum": (lambda f, y: functional.cross_entropy(f, y, reduction="sum"), labels),
    "log-probabilities": (lambda f, y: functional.nll_loss(f.log_softmax(1), y), labels),
    "squares": (functional.mse_loss, lambda: torch.randn(B, C).double()),
    "huber": (lambda f, y: functional.huber_loss(f, y, delta=0.5), lambda: torch.randn(B, C).double()),
    "smooth": (functional.smooth_l1_loss, lambda: torch.randn(B, C).double()),
    "logistic": (functional.binary_cross_entropy_with_logits, lambda: torch.rand(B, C).double()),
}


@pytest.mark.parametrize("divisor", [1.0, 4.0])
@pytest.mark.parametrize("name", LOSSES)
def test_later_steps_are_not_watched_and_read_the_same(name, divisor):
    step, targets = LOSSES[name]
    steps = Steps(step, targets())
    entered = []
    for _ in range(6):
        watched, found, outputs = steps.run(divisor)
        entered.append(watched)
        expected = torch.stack([step(outputs[n : n + 1], steps.targets[n : n + 1]) for n in range(B)])
        torch.testing.assert_close(found.losses.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert entered == [True] * 2 + [False] * 4
    assert steps.watch.excess is None or float(steps.watch.excess) <= 0


def weigh(outputs, targets):
    return functional.cross_entropy(outputs, targets, weight=torch.ones(C).double())


def halve(outputs, targets):
    return functional.cross_entropy(outputs, targets) / 2


def divide_by_tensor(outputs, targets):
    return functional.cross_entropy(outputs, targets) / torch.ones((), dtype=torch.float64)


def smooth(outputs, targets):
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)


@pytest.mark.parametrize("step", [weigh, halve, smooth, divide_by_tensor])
def test_losses_that_a_node_does_not_say_all_of_go_on_being_watched(step):
    steps = Steps(step, labels())
    for _ in range(5):
        watched, found, outputs = steps.run()
        assert watched or step is divide_by_tensor  # by the number one, as Lightning does
        losses = functional.cross_entropy(
            outputs, steps.targets, reduction="none", label_smoothing=0.1 if step is smooth else 0
        )
        expected = losses / 2 if step is halve else losses
        torch.testing.assert_close(found.losses.double(), expected, rtol=1e-6, atol=1e-6)


def with_penalty(outputs, targets):
    return functional.cross_entropy(outputs, targets) + outputs.square().mean()


def picked(outputs, targets):
    return functional.cross_entropy(outputs[targets.new_ones(B, dtype=torch.bool)], targets)


@pytest.mark.parametrize("other", [with_penalty, picked, halve, functional.mse_loss])
def test_a_step_that_is_made_otherwise_is_missed_and_the_next_ones_are_watched(other):
    steps = Steps(functional.cross_entropy, labels())
    for _ in range(4):
        watched, *_ = steps.run()
    assert not watched
    if other is functional.mse_loss:
        steps.targets = torch.randn(B, C).double()
    with pytest.raises(LossCaptureError, match="made otherwise"):
        steps.run(step=other)
    steps.targets = labels()
    for _ in range(3):  # for good
        watched, found, outputs = steps.run()
        assert watched
        losses = functional.cross_entropy(outputs, steps.targets, reduction="none")
        torch.testing.assert_close(found.losses.double(), losses, rtol=1e-6, atol=1e-6)


def test_hooks_that_pack_what_a_step_saves_are_run_no_more_often():
    counts = {"pack": 0, "unpack": 0}

    def count(kind):
        def hook(tensor):
            counts[kind] += 1
            return tensor

        return hook

    def step(outputs, targets):
        with saved_tensors_hooks(count("pack"), count("unpack")):
            return functional.cross_entropy(outputs, targets)

    steps = Steps(step, labels())
    watched = [steps.run()[0] for _ in range(5)]
    assert all(watched)
    assert counts["pack"] == counts["unpack"] > 0  # once by each backward pass


def test_targets_that_are_changed_after_the_loss_are_left_to_the_backward_pass():
    steps = Steps(functional.mse_loss, torch.randn(B, C).double())

    def change(outputs, targets):
        loss = functional.mse_loss(outputs, targets)
        targets.add_(1)
        return loss

    for _ in range(4):
        steps.run()
    with pytest.raises(LossCaptureError, match="made otherwise"):
        steps.run(step=change)


def test_the_modes_of_others_are_left_alone():
    class Other(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    steps = Steps(functional.cross_entropy, labels())
    with Other() as other:
        for _ in range(5):
            steps.run()
        assert torch.overrides._get_current_function_mode_stack() == [other]
