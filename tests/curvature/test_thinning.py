"""Fewer rows and fewer gradients: on average the sums over all, and these themselves where all are kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lightning_influence.curvature import thinning
from lightning_influence.curvature.factors import LayerStatistics
from lightning_influence.curvature.thinning import (
    count_rows,
    count_sums,
    draw_positions,
    mix_examples,
    thin_outputs,
    thin_rows,
)
from lightning_influence.model.captured import Captured
from lightning_influence.model.layers.gradients import FactoredGradients
from lightning_influence.model.layers.layer import Layer, find_rule
from lightning_influence.model.layers.recorder import Recorder

EXAMPLES = 4
ALL_SIGNS = [
    torch.tensor(signs, dtype=torch.float64) for signs in itertools.product([1, -1], repeat=EXAMPLES)
]


def moment(rows):
    """Second moment of rows ``(G, n, d)``."""
    return torch.einsum("gni,gnj->gij", rows, rows)


@pytest.fixture
def outputs():
    return torch.randn(2, EXAMPLES, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("limit", [3, 6, 8])
def test_output_rows_stand_for_all_on_the_average_over_all_signs(monkeypatch, outputs, limit):
    moments = []
    for signs in ALL_SIGNS:
        monkeypatch.setattr(thinning, "draw_signs", lambda like, generator, signs=signs: signs)
        rows = thin_outputs(outputs, limit)
        assert rows.shape[1] < EXAMPLES * 3
        moments.append(moment(rows))
    torch.testing.assert_close(torch.stack(moments).mean(0), moment(outputs.flatten(1, 2)))


def test_output_rows_stand_for_all_on_the_average_over_all_signs_and_positions(monkeypatch, outputs):
    moments = []
    for signs, few in itertools.product(ALL_SIGNS, itertools.combinations(range(3), 2)):
        monkeypatch.setattr(thinning, "draw_signs", lambda like, generator, signs=signs: signs)
        monkeypatch.setattr(thinning, "draw_positions", lambda *args, few=few: torch.tensor([few]))
        rows = thin_outputs(outputs, 2)
        assert rows.shape[1] == 2
        moments.append(moment(rows))
    torch.testing.assert_close(torch.stack(moments).mean(0), moment(outputs.flatten(1, 2)))


def test_output_rows_are_all_where_all_are_within_the_limit(outputs):
    assert torch.equal(thin_outputs(outputs, EXAMPLES * 3), outputs.flatten(1, 2))


@pytest.mark.parametrize("sums", [1, 2, 3])
def test_squares_of_mixed_gradients_are_those_of_all_on_the_average_over_all_signs(
    monkeypatch, outputs, sums
):
    monkeypatch.setattr(thinning, "_SUMS", sums)
    inputs = torch.randn(2, EXAMPLES, 3, 6, dtype=torch.float64)
    gradients = FactoredGradients(inputs, outputs[None])
    squares = []
    for signs in ALL_SIGNS:
        monkeypatch.setattr(thinning, "draw_signs", lambda like, generator, signs=signs: signs)
        mixed = mix_examples(gradients)
        assert mixed.num_examples == count_sums(EXAMPLES, 3) < EXAMPLES
        squares.append(mixed.sum_of_squares())
    expected = torch.einsum("gbro,gbri->bgoi", outputs, inputs).square().sum(0)
    torch.testing.assert_close(torch.stack(squares).mean(0), expected)


def test_gradients_of_one_position_are_not_mixed(outputs):
    gradients = FactoredGradients(torch.ones(2, EXAMPLES, 1, 6).double(), outputs[None, :, :, :1])
    assert mix_examples(gradients) is gradients
    assert count_sums(100, 1) == 100


def test_every_choice_of_positions_is_drawn_as_often():
    generator, counts = torch.Generator().manual_seed(0), dict[tuple[int, ...], int]()
    for row in draw_positions(6000, 4, 2, generator).sort(1).values.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert set(counts) == set(itertools.combinations(range(4), 2))
    assert all(abs(count - 1000) < 150 for count in counts.values())


def test_rows_follow_the_cost_of_the_layer_but_are_not_few():
    assert count_rows(10, 5, 100, 100) == 10
    assert count_rows(8192, 32, 64, 64) == 1024
    assert count_rows(8192, 32, 1000, 64) == 65
    assert count_rows(8192, 128, 1000, 10) == 128


LAYERS = {
    "linear": (nn.Linear(3, 2), (EXAMPLES, 6, 3)),
    "rows of examples": (nn.Linear(3, 2, bias=False), (EXAMPLES * 6, 3)),
    "conv": (nn.Conv2d(2, 3, 3, padding=1, stride=2), (EXAMPLES, 2, 7, 6)),
    "groups": (nn.Conv2d(4, 6, (3, 2), groups=2, dilation=(1, 2), bias=False), (EXAMPLES, 4, 6, 7)),
    "circular": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (EXAMPLES, 2, 8)),
    "folded": (nn.Conv2d(1, 2, 2), (EXAMPLES * 3, 1, 3, 4)),
    "volume": (nn.Conv3d(2, 2, 2, stride=(1, 2, 1), padding="valid"), (EXAMPLES, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("kind", list(LAYERS))
def test_inputs_at_positions_are_those_of_all_inputs(kind):
    module, shape = LAYERS[kind]
    layer = Layer.of(kind, module, find_rule(module))
    x = torch.randn(shape, dtype=torch.float64)
    everywhere = layer.inputs(x, EXAMPLES)
    positions = draw_positions(EXAMPLES, everywhere.shape[2], 5)
    expected = torch.stack([everywhere[:, b, positions[b]] for b in range(EXAMPLES)], 1)
    torch.testing.assert_close(layer.inputs_at(x, EXAMPLES, positions), expected)


class Twice(nn.Module):
    """A layer that is called twice, with another number of positions, and one that is called once."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()

    def forward(self, x):
        hidden = self.shared(x).tanh()
        return self.last(hidden.mean(1)) + self.last(self.shared(hidden[:, :2]).sum(1))


def capture(examples=EXAMPLES, positions=4):
    """Recorder and outputs of a forward pass."""
    torch.manual_seed(0)
    net = Twice()
    layers = {n: Layer.of(n, m, find_rule(m)) for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    with Recorder(layers) as recorder:
        values = net(torch.randn(examples, positions, 3).double()).square().sum(1)
    return Captured(examples, None, values, recorder), values


def test_input_rows_stand_for_all_on_the_average_over_all_positions():
    captured, _ = capture()
    everything = captured.recorder.inputs(EXAMPLES)["shared"]  # (1, B, 4 + 2, 4)
    total, few = [], 1
    for first, second in itertools.product(range(4), range(2)):
        chosen = {4: torch.full((EXAMPLES, few), first), 2: torch.full((EXAMPLES, few), second)}
        found = captured.recorder.inputs_at(EXAMPLES, lambda _, count, chosen=chosen: chosen.get(count))
        rows, positions = found["shared"]
        assert positions == 6
        total.append(moment(rows))
    torch.testing.assert_close(torch.stack(total).mean(0), moment(everything.flatten(1, 2)))


@pytest.mark.parametrize("examples", [EXAMPLES, 40])
def test_statistics_of_thin_rows(examples):
    captured, values = capture(examples)
    outputs = captured.curvature_outputs("empirical")
    rows = thin_rows(captured, outputs, torch.Generator().manual_seed(0))
    for name, gradients in captured.gradients_of(values).items():
        thin, full = (
            LayerStatistics.zeros(captured.recorder.layers[name].shape, dtype=torch.float64) for _ in "ab"
        )
        full.add_covariances(gradients)
        few = rows[name]
        thin.add_rows(few.inputs, few.outputs, few.examples, few.positions)
        assert (thin.examples, thin.positions) == (full.examples, full.positions)
        if gradients.inputs.shape[2] * examples <= 64:  # all are kept
            torch.testing.assert_close(thin.inputs, full.inputs)
            torch.testing.assert_close(thin.outputs, full.outputs)
        else:
            assert few.outputs.shape[1] <= 64 < gradients.inputs.shape[2] * examples
            assert few.inputs[0, :, -1].square().sum() == pytest.approx(few.positions)  # of the bias
