"""The certificate names what is wrong, and what it names is had in a slower way or left out by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from use_oracle import Formula, numbers, reference_gradients, squared_loss

from lightning_influence.model.uses import (
    Dense,
    Place,
    UseReport,
    Watch,
    Way,
    certify,
    differentiate_losses,
    draw_weights,
    pull_gradients,
    register_operation,
    weigh_losses,
)
from lightning_influence.model.uses.exact import ParameterReport
from lightning_influence.model.uses.operations import registry

B = 4
ZEROS = torch.zeros(B, dtype=torch.float64)


def run(model, x, count=B, **kwargs):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with Watch(parameters, (x, ZEROS), count, **kwargs) as watch:
        losses = squared_loss(model, (x, ZEROS))
    return watch, losses


def assert_exact(found, model, x):
    for name, grad in reference_gradients(model, (x, ZEROS), squared_loss).items():
        torch.testing.assert_close(found.gradients[name].dense()[0], grad, rtol=1e-9, atol=1e-9)


def verdicts_of(watch, losses, gradients):
    weights = draw_weights(B, losses)
    return certify(gradients, weights, weigh_losses(losses, weights, watch.parameters), watch.eps)


def two_layers():
    return Formula(lambda p, x: torch.tanh(x @ p.first) @ p.second, first=(5, 5), second=(5, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_right_gradients_pass_and_a_wrong_one_is_named(dtype):
    model, x = two_layers().to(dtype), numbers(B, 5).to(dtype)
    watch, losses = run(model, x)
    gradients = pull_gradients(watch, losses.sum(), [None]).gradients
    assert all(verdict.passed for verdict in verdicts_of(watch, losses, gradients).values())
    wrong = gradients["second"].dense()
    wrong[0, 1] *= 1.01
    gradients["second"] = _dense(gradients["second"], wrong)
    verdicts = verdicts_of(watch, losses, gradients)
    assert [name for name, verdict in verdicts.items() if not verdict.passed] == ["second"]


def _dense(gradient, values):
    return type(gradient)(gradient.shape, [(Dense(values), None)], 1, B, values)


def test_examples_that_trade_places_are_found_although_the_sum_is_right():
    model, x = two_layers(), numbers(B, 5)
    watch, losses = run(model, x)
    gradients = pull_gradients(watch, losses.sum(), [None]).gradients
    for name, gradient in gradients.items():
        gradients[name] = _dense(gradient, gradient.dense()[:, [1, 0, 2, 3]])
    assert not any(verdict.passed for verdict in verdicts_of(watch, losses, gradients).values())


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_a_part_in_lower_precision_is_allowed_its_rounding(low):
    model = Formula(lambda p, x: torch.tanh((x @ p.a).to(low)).to(x) @ p.b, a=(5, 5), b=(5, 2))
    watch, losses = run(model, numbers(B, 5))
    assert watch.eps == torch.finfo(low).eps
    found = differentiate_losses(watch, losses)
    assert {report.way for report in found.report.parameters.values()} == {Way.USES}


def test_a_missing_parameter_and_one_that_is_not_a_number_do_not_pass():
    model, x = two_layers(), numbers(B, 5)
    watch, losses = run(model, x)
    gradients = pull_gradients(watch, losses.sum(), [None]).gradients
    del gradients["first"]
    gradients["second"] = _dense(gradients["second"], gradients["second"].dense() * float("nan"))
    assert not any(verdict.passed for verdict in verdicts_of(watch, losses, gradients).values())


def test_parts_of_the_batch_stand_for_weights():
    model, x = two_layers(), numbers(B, 5)
    watch, losses = run(model, x)
    gradients = pull_gradients(watch, losses.sum(), [None]).gradients
    part = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    mean = squared_loss(model, (x[::2], ZEROS[::2])).mean()  # all that a batch loss tells
    reference = torch.autograd.grad(2 * mean, list(watch.parameters.values()))
    reference = dict(zip(watch.parameters, reference, strict=True))
    assert all(verdict.passed for verdict in certify(gradients, part, reference, watch.eps).values())
    other = torch.tensor([0, 1.0, 1, 0], dtype=torch.float64)
    assert not any(verdict.passed for verdict in certify(gradients, other, reference, watch.eps).values())


def test_a_wrong_place_of_the_batch_is_found_and_mended():
    model, x = Formula(lambda p, x: (x @ p.w).transpose(0, 1), w=(5, 3)), numbers(B, B, 5)  # time first
    watch, losses = run(model, x, places={x: Place(0)})
    found = differentiate_losses(watch, losses)
    assert found.report.parameters["w"].way is Way.EXAMPLES
    assert "do not add up" in found.report.parameters["w"].reason
    assert_exact(found, model, x)
    watch, losses = run(model, x, places={x: Place(1)})
    found = differentiate_losses(watch, losses)
    assert found.report.parameters["w"].way is Way.USES
    assert_exact(found, model, x)


class _Hidden(torch.autograd.Function):
    """Multiplies by a weight without a torch function that could be seen."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.T, x.T @ grad


def test_what_nobody_sees_is_differentiated_example_by_example():
    model = Formula(lambda p, x: _Hidden.apply(torch.tanh(x @ p.a), p.b) @ p.c, a=(5, 5), b=(5, 5), c=(5, 2))
    x = numbers(B, 5)
    watch, losses = run(model, x)
    found = differentiate_losses(watch, losses)
    ways = {name: report.way for name, report in found.report.parameters.items()}
    assert ways == {"a": Way.USES, "b": Way.EXAMPLES, "c": Way.USES}
    assert_exact(found, model, x)


def test_examples_that_a_batch_norm_couples_have_their_own_gradients():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    x = numbers(B, 5)
    mean = model[1].running_mean.clone()
    watch, losses = run(model, x)
    after = model[1].running_mean.clone()
    found = differentiate_losses(watch, losses)
    assert not torch.equal(mean, after)
    assert torch.equal(after, model[1].running_mean)  # of one forward pass, the user's
    for name, grad in reference_gradients(model, (x, ZEROS), squared_loss).items():
        torch.testing.assert_close(found.gradients[name].dense()[0], grad, rtol=1e-7, atol=1e-9)


def test_parameters_without_part_are_called_so():
    model = Formula(lambda p, x: x @ p.used, used=(5, 2), idle=(3,))
    found = differentiate_losses(*run(model, numbers(B, 5)))
    assert found.report.parameters["idle"].way is Way.UNUSED
    assert "idle" not in found.gradients
    assert found.report.share == 1.0


def test_penalties_on_weights_do_not_disturb():
    model = two_layers()
    x = numbers(B, 5)
    with Watch(dict(model.named_parameters()), (x, ZEROS), B) as watch:
        losses = squared_loss(model, (x, ZEROS))
        (losses.mean() + sum(p.square().sum() for p in model.parameters()))
    found = differentiate_losses(watch, losses)
    assert {report.way for report in found.report.parameters.values()} == {Way.USES}
    assert_exact(found, model, x)


def test_inputs_that_change_after_their_use_are_kept_or_refused():
    model = Formula(lambda p, x: x, bias=(3,))
    weight, x = numbers(3, 5), numbers(B, 5)

    def forward(p, x):
        h = x * 1.0
        out = functional.linear(h, weight, p.bias)
        h.mul_(3.0)  # automatic differentiation allows it: the weight is frozen
        return out + h.sum(1, keepdim=True)

    model.formula = forward
    found = differentiate_losses(*run(model, x))
    assert found.report.parameters["bias"].way is Way.USES
    assert_exact(found, model, x)
    model.formula = lambda p, x: functional.linear(x, weight, p.bias) * 2
    watch, losses = run(model, x)
    x.add_(1.0)  # when nobody watches any more
    found = pull_gradients(watch, losses.sum(), [None])
    assert "changed in place" in found.failed["bias"]
    assert not found.gradients


def test_shares_count_what_is_left_out():
    parameters = {
        "a": ParameterReport(Way.USES, 30, 9.0),
        "b": ParameterReport(Way.LEFT_OUT, 10, 1.0, "why"),
    }
    report = UseReport(parameters)
    assert report.left_out == ["b"]
    assert report.share == 0.75
    assert report.gradient_share == 0.9


def test_an_operation_of_ones_own_has_its_closed_form(monkeypatch):
    monkeypatch.setattr(registry, "_OPERATIONS", dict(registry._OPERATIONS))
    calls = []

    @register_operation(torch.atan2, arguments=("input", "other"))
    def pull_angle(call):
        calls.append(call.sources())
        x, w = call.examples("input"), call.get("other").detach()
        return {"other": Dense((call.gradient() * -x / (x**2 + w**2)).sum(dim=2))}

    model, x = Formula(lambda p, x: torch.atan2(x, p.w), w=(5,)), numbers(B, 5)
    found = differentiate_losses(*run(model, x))
    assert calls == [{"other"}]
    assert found.report.parameters["w"].way is Way.USES
    assert_exact(found, model, x)


def test_weights_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    weights = draw_weights(100, ZEROS)
    assert torch.equal(state, torch.get_rng_state())
    assert bool((weights.abs() >= 0.5).all())
    assert 20 < int((weights < 0).sum()) < 80


LAYERS = st.lists(
    st.sampled_from(["linear", "square", "norm", "scale", "shift", "conv", "transpose", "attend", "tied"]),
    min_size=1,
    max_size=6,
)


class Random(nn.Module):
    """A chain of operations on ``(B, T, D)`` with ``T == D``."""

    def __init__(self, kinds, width):
        super().__init__()
        self.kinds, self.tied = kinds, nn.Parameter(numbers(width, width) / width)
        self.steps = nn.ModuleDict()
        for at, kind in enumerate(kinds):
            layer = {
                "linear": nn.Linear(width, width),
                "norm": nn.LayerNorm(width),
                "conv": nn.Conv1d(width, width, 3, padding=1),
                "attend": nn.MultiheadAttention(width, 1, batch_first=at % 2 == 0),
            }.get(kind)
            if layer is not None:
                self.steps[str(at)] = layer
            elif kind in ("scale", "shift"):
                self.register_parameter(f"{kind}{at}", nn.Parameter(numbers(width, 1 + at % 2 * (width - 1))))

    def forward(self, x):
        for at, kind in enumerate(self.kinds):
            if kind in ("linear", "norm", "conv"):
                x = x + torch.tanh(self.steps[str(at)](x))
            elif kind == "square":
                x = torch.sin(x)
            elif kind == "attend":
                x = x + self.steps[str(at)](x, x, x)[0] if at % 2 == 0 else self.first(at, x)
            elif kind == "transpose":
                x = x.transpose(1, 2)
            elif kind == "tied":
                x = x @ (self.tied if at % 2 else self.tied.T)
            elif kind == "scale":
                x = x * getattr(self, f"scale{at}")
            else:
                x = x + getattr(self, f"shift{at}")
        return x

    def first(self, at, x):
        rows = x.transpose(0, 1)
        return (rows + self.steps[str(at)](rows, rows, rows)[0]).transpose(0, 1)


@settings(deadline=None, max_examples=40)
@given(LAYERS, st.integers(1, 5), st.integers(2, 5))
def test_random_models_are_exact(kinds, count, width):
    model = Random(kinds, width).double()
    x, y = numbers(count, width, width), torch.zeros(count, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    with Watch(parameters, (x, y), count) as watch:
        losses = squared_loss(model, (x, y))
    if not losses.requires_grad:
        return
    found = differentiate_losses(watch, losses)
    assert {report.way for report in found.report.parameters.values()} <= {Way.USES, Way.UNUSED}
    for name, grad in reference_gradients(model, (x, y), squared_loss).items():
        if name in found.gradients:
            torch.testing.assert_close(found.gradients[name].dense()[0], grad, rtol=1e-8, atol=1e-8)
        else:
            assert not grad.any()
