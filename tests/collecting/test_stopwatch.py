"""Costs of collecting by the clock, and what a fit on sequences sums up."""

from __future__ import annotations

import itertools

import lightning
import pytest
import torch
from callback_models import Classifier, fit, same
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence.collecting.callback import InfluenceCallback
from lightning_influence.collecting.stopwatch import Stopwatch

CLOCK = "lightning_influence.collecting.stopwatch.read_clock"


def test_work_is_no_part_of_the_training(monkeypatch) -> None:
    times = iter([0.0, 1.0, 4.0, 6.0, 10.0, 12.0])
    monkeypatch.setattr(CLOCK, lambda: next(times))
    watch = Stopwatch()
    watch.begin_step()  # at 0
    with watch.working():  # from 1 to 4
        pass
    assert watch.work == 3.0
    watch.end_step()  # at 6
    watch.begin_step()  # at 10
    watch.end_step()  # at 12
    assert (watch.work, watch.training, watch.steps) == (3.0, 5.0, 2)
    watch.reset()
    watch.end_step()  # of a step that began before
    assert (watch.work, watch.training, watch.steps) == (0.0, 0.0, 0)


def test_measured_costs_are_kept_and_change_no_weight(monkeypatch) -> None:
    def run(clock):
        monkeypatch.setattr(CLOCK, clock)
        callback, module = InfluenceCallback(overhead=0.9), Classifier("adam")
        fit(module, callback, max_epochs=16)
        return callback.state_dict()["collector"]["schedule"], module

    counted, one = run(lambda: 0.0)
    # Each look at the clock takes a second: a step two, and what is collected in it two more.
    measured, other = run(itertools.count(0.0).__next__)
    again, _ = run(itertools.count(0.0).__next__)
    assert measured == again
    assert measured["costs"] != counted["costs"]
    ratios = {name: measured["costs"][name] / counted["costs"][name] for name in counted["costs"]}
    assert ratios.pop("hooks") == 1
    assert max(ratios.values()) == pytest.approx(min(ratios.values()))
    assert same(dict(one.state_dict()), dict(other.state_dict()))
    loaded = InfluenceCallback()
    assert loaded.state_dict()["collector"]["schedule"]["costs"] is None
    assert measured["batch"] == 8


class Sequences(lightning.LightningModule):
    """A layer at each of 50 positions; its weights stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.head(self.body(batch[0]).tanh().mean(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.slow
def test_sums_over_some_positions_are_on_average_those_over_all() -> None:
    torch.manual_seed(2)
    x, y = torch.randn(16, 50, 3).double(), torch.arange(16) % 3
    module, data, sums = Sequences(), DataLoader(TensorDataset(x, y), 16), []
    for seed in range(30):
        callback = InfluenceCallback(every_n_steps=1, seed=seed, strict=True)
        fit(module, callback, data=data, max_epochs=5, seed=0)
        layer = callback.factors.layers["body"]
        assert (layer.examples, layer.positions) == (32, 32 * 50)
        assert layer.inputs[0, -1, -1] == pytest.approx(layer.positions)  # of the bias
        sums.append((layer.inputs[0] / layer.positions, layer.outputs[0] / layer.examples))
    abar = torch.cat([x, torch.ones(16, 50, 1).double()], 2).flatten(0, 1)
    hidden = module.body(x)
    logits = module.head(hidden.tanh().mean(1))
    p = logits.softmax(1).detach()
    outputs = 0.0
    for label in range(3):
        column = p[:, label, None].sqrt() * (functional.one_hot(torch.tensor(label), 3) - p)
        rows = torch.autograd.grad(logits, hidden, column, retain_graph=True)[0].flatten(0, 1)
        outputs = outputs + rows.T @ rows / 16
    for found, expected in zip(zip(*sums, strict=True), (abar.T @ abar / 800, outputs), strict=True):
        each = torch.stack(found)
        error = each.std(0) / len(each) ** 0.5
        assert bool(((each.mean(0) - expected).abs() <= 5 * error + 1e-12).all())
        assert float(error.max()) < 0.2 * float(expected.abs().max())
