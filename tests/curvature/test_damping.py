"""Damping from the training run: the optimizers' fixed points, the record, and the rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_influence.curvature.damping import average_eigenvalues, resolve_damping
from lightning_influence.curvature.factors import Factors, LayerStatistics
from lightning_influence.curvature.training_record import LayerRecord, TrainingRecord, effective_rate
from lightning_influence.model.layers.plan import find_layers

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
LAYERS = find_layers(MODEL).layers


def factors(squares: bool = True) -> Factors:
    generator = torch.Generator().manual_seed(1)
    result = Factors(weight_sum=20.0, weight_examples=10.0)
    for name, (groups, d_out, d_in) in (("0", (1, 4, 4)), ("2", (1, 2, 5))):
        layer = LayerStatistics.zeros((groups, d_out, d_in), dtype=torch.float64)
        a = torch.randn(groups, 10, d_in, generator=generator, dtype=torch.float64)
        s = torch.randn(groups, 10, d_out, generator=generator, dtype=torch.float64)
        layer.inputs, layer.outputs, layer.examples, layer.positions = a.mT @ a, s.mT @ s, 10.0, 10.0
        if squares:
            layer.squares, layer.squares_examples = (s.square().mT @ a.square()), 10.0
        result.layers[name] = layer
    return result


LEVEL = (average_eigenvalues(factors(), "0") + average_eigenvalues(factors(), "2")) / 2


def stepped(optimizer: torch.optim.Optimizer, rates: list[float]) -> TrainingRecord:
    record = TrainingRecord()
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        record.add_step(optimizer, LAYERS)
        for p in MODEL.parameters():
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    record.read_metric(optimizer, LAYERS)
    return record


def test_layers_of_other_groups_have_other_rates():
    first, second = MODEL[0], MODEL[2]
    groups = [{"params": first.parameters(), "lr": 0.1}, {"params": second.parameters(), "lr": 0.3}]
    record = TrainingRecord()
    for _ in range(2):
        record.add_step(torch.optim.SGD(groups, weight_decay=0.5), LAYERS)
    assert [record.layers[name].rate for name in ("0", "2")] == pytest.approx([0.2, 0.6])


@pytest.mark.parametrize(("nesterov", "dampening"), [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_effective_rate_is_what_one_gradient_ends_up_moving(nesterov, dampening) -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], 0.1, momentum=0.9, nesterov=nesterov, dampening=dampening)
    expected = 0.0
    for step in range(600):
        if step == 1:  # the first step of torch's SGD is not damped
            expected = p.item() - effective_rate(optimizer.param_groups[0])
            optimizer.state[p]["momentum_buffer"].zero_()
            expected = p.item() - effective_rate(optimizer.param_groups[0])
        p.grad = torch.full_like(p, 1.0 if step == 1 else 0.0)
        optimizer.step()
    assert p.item() == pytest.approx(expected, rel=1e-12)


def test_sgd_rule() -> None:
    optimizer = torch.optim.SGD(MODEL.parameters(), 0.1, momentum=0.5, weight_decay=0.01)
    record = stepped(optimizer, [0.1, 0.2, 0.1])
    record.loss_scale = 4.0
    values, origin = resolve_damping("auto", factors(), record, solver="full")
    assert values == pytest.approx(dict.fromkeys("02", (0.01 + 4 / 0.8) / 4))
    assert "3 steps of SGD" in origin


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_rules(optimizer_class) -> None:
    optimizer = optimizer_class(MODEL.parameters(), 0.1, weight_decay=0.0, eps=1e-3)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    record = stepped(optimizer, [0.1, 0.3])
    # The same gradient twice: the bias-corrected second moment is exactly its square.
    for layer in record.layers.values():
        assert layer.metric == pytest.approx(0.5 + 1e-3, rel=1e-5)
        layer.weight_decay = 0.02
    values, origin = resolve_damping("auto", factors(), record, solver="full")
    adam = optimizer_class is torch.optim.Adam
    expected = 0.02 + 4 * 0.501 / 0.4 if adam else 0.501 * (0.02 + 4 / 0.4)
    assert values == pytest.approx(dict.fromkeys("02", expected), rel=1e-5)
    assert f"of {optimizer_class.__name__} " in origin


def test_weight_and_bias_in_different_groups_are_averaged_by_size() -> None:
    biases = [p for name, p in MODEL.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in MODEL.named_parameters() if name.endswith("weight")]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.5}], lr=0.1
    )
    record = TrainingRecord()
    record.add_step(optimizer, LAYERS)
    first = record.layers["0"]  # 12 weights and 4 biases
    assert (first.rate, first.weight_decay) == (
        pytest.approx((12 * 0.1 + 4 * 0.5) / 16),
        pytest.approx(0.075),
    )


def test_two_optimizers_each_serve_their_layers() -> None:
    first = torch.optim.SGD(MODEL[0].parameters(), 0.1)
    second = torch.optim.SGD(MODEL[2].parameters(), 0.3)
    record = TrainingRecord()
    for optimizer in (first, second, first):
        record.add_step(optimizer, LAYERS)
    assert {name: layer.rate for name, layer in record.layers.items()} == pytest.approx({"0": 0.2, "2": 0.3})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: [torch.optim.RMSprop(p, 0.1)], "with RMSprop is not known"),
        (lambda p: [torch.optim.SGD(p, 0.1), torch.optim.Adam(p, 0.1)], "sgd and adam optimizers in one run"),
    ],
)
def test_unknown_optimizer_falls_back_with_its_reason(make, reason) -> None:
    record = TrainingRecord()
    for optimizer in make(list(MODEL.parameters())):
        record.add_step(optimizer, LAYERS)
    values, origin = resolve_damping("auto", factors(), record, solver="full")
    assert reason in origin
    assert values == dict.fromkeys("02", LEVEL)


def test_without_a_record_full_solvers_use_the_level_of_the_eigenvalues() -> None:
    values, origin = resolve_damping("auto", factors(), None, solver="full")
    assert "no training run was recorded, so the mean eigenvalue of a layer, averaged over" in origin
    assert values == dict.fromkeys("02", LEVEL)


def test_layer_that_no_step_updated() -> None:
    record = TrainingRecord(steps=5, layers={"0": LayerRecord(rate=2.0)})
    values, origin = resolve_damping("auto", factors(), record, solver="full")
    assert values == {"0": 2.0, "2": LEVEL}
    assert "for ['2'], which no step updated" in origin


@pytest.mark.parametrize("rate", [2.0, None])
def test_closed_forms_use_a_hundredth_of_the_eigenvalues_and_of_the_run(rate) -> None:
    known = {"0": LayerRecord(rate=rate)} if rate else {}
    record = TrainingRecord(steps=5, layers=known) if rate else None
    values, origin = resolve_damping("auto", factors(), record, solver="closed")
    full = {"0": 4 / rate if rate else LEVEL, "2": LEVEL}
    for name in "02":
        assert values[name] == pytest.approx(0.01 * (average_eigenvalues(factors(), name) + full[name]))
    assert ("5 steps of SGD" if rate else "no training run was recorded") in origin


def test_a_part_of_the_layers_has_the_level_of_all() -> None:
    """Where processes share layers out, each asks for its own and gets what one process would."""
    means = {name: average_eigenvalues(factors(), name) for name in "02"}
    part = factors()
    del part.layers["2"]
    for solver in ("closed", "full"):
        whole = resolve_damping("auto", factors(), None, solver=solver)[0]
        assert resolve_damping("auto", part, None, solver=solver, means=means)[0] == {"0": whole["0"]}


def test_mean_eigenvalue_is_the_trace_over_the_size() -> None:
    with_squares, without = factors(), factors(squares=False)
    for name, layer in with_squares.layers.items():
        assert layer.squares is not None
        expected = layer.squares.sum().item() / 10 / math.prod(layer.shape) / 2.0  # mean weight 2
        assert average_eigenvalues(with_squares, name) == pytest.approx(expected, rel=1e-12)
        traces = layer.inputs[0].trace() / 10 * layer.outputs[0].trace() / 10
        expected = traces.item() / math.prod(layer.shape) / 2.0
        assert average_eigenvalues(without, name) == pytest.approx(expected, rel=1e-12)


def test_number_is_taken_as_it_is() -> None:
    assert resolve_damping(0.25, factors(), None, solver="full") == ({"0": 0.25, "2": 0.25}, "given")


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "best", None, True])
def test_bad_damping(bad) -> None:
    with pytest.raises(
        ValueError, match="accepted are 'auto', 'heuristic', or a finite number of at least 0"
    ):
        resolve_damping(bad, factors(), None, solver="full")


def test_record_survives_its_state() -> None:
    record = stepped(torch.optim.AdamW(MODEL.parameters(), 0.1), [0.1])
    assert TrainingRecord.from_state_dict(record.state_dict()) == record
