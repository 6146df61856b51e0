"""A selection rule and a direction of a user's own, from the public names alone."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule, InfluenceTrainer
from lightning_influence.edits import (
    Problem,
    SelectionRule,
    SubsetSolution,
    count_budget,
    direction_names,
    register_direction,
    register_rule,
    rule_names,
)

SEEN = {}


@register_rule("mine")
class StrongestBiases(SelectionRule):
    """The biases of the channels that the examples pull at most."""

    source = "gradients"

    def mask(self, scores, shape, ratio, generator):
        SEEN[shape] = scores.clone()
        chosen = torch.zeros(shape, dtype=torch.bool)
        strongest = scores.argsort(descending=True)[: count_budget(shape, ratio)]
        chosen.view(-1, shape[-1])[strongest.cpu(), -1] = True
        return chosen


@register_rule("most_active")
class MostActive(SelectionRule):
    """All of the one channel that the examples excite most."""

    source = "outputs"

    def mask(self, scores, shape, ratio, generator):
        SEEN[shape] = scores.clone()
        chosen = torch.zeros(shape, dtype=torch.bool)
        chosen.view(-1, shape[-1])[scores.argmax()] = True
        return chosen


@register_direction("mine")
def solve_by_diagonal(problem: Problem) -> SubsetSolution:
    """The gradient, each parameter over a rough diagonal of its own curvature."""
    return SubsetSolution(problem.gradient * problem.inverse_diagonal, residual=0.0, steps=0)


@register_direction("wrong")
def solve_wrongly(problem):
    return problem.gradient


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 6), torch.nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.first(x).tanh())

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = (x[:, 0] > 0).long()
    loader, module = DataLoader(TensorDataset(x, y), 16), Net()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", max_epochs=8, enable_model_summary=False, **options).fit(module, loader)
    return InfluenceTrainer(accelerator="cpu", **options), module, loader, x, y


def scores_by_hand(module, x, y):
    """Absolute means over examples of the channels' outputs, and of the loss's gradients in them."""
    hidden = module.first(x)
    hidden.retain_grad()
    outputs = module.last(hidden.tanh())
    outputs.retain_grad()
    torch.nn.functional.cross_entropy(outputs, y, reduction="sum").backward()
    return [(t.detach().mean(0).abs(), t.grad.sum(0).abs()) for t in (hidden, outputs)]


def test_a_rule_by_gradients_serves_the_trainer(trained):
    trainer, module, loader, x, y = trained
    SEEN.clear()
    edit = trainer.forget(y == 0, module, loader, rule="mine", ratio=0.2, kept_bound=1e9)
    assert edit.report.rule == "mine"
    assert "mine" in rule_names()
    assert set(edit.changes) == {"first.bias", "last.bias"}
    expected = scores_by_hand(copy.deepcopy(module), x[y == 0], y[y == 0])
    for shape, (_, pulls) in zip(((1, 6, 4), (1, 2, 7)), expected, strict=True):
        torch.testing.assert_close(SEEN[shape], pulls, rtol=1e-4, atol=1e-5)
    # A fifth of the 24 parameters of the first layer is 5: of six biases all but the weakest.
    weakest = int(expected[0][1].argmin())
    assert edit.changes["first.bias"].index.tolist() == [i for i in range(6) if i != weakest]
    with edit, torch.no_grad():
        assert float(torch.nn.functional.cross_entropy(module(x[y == 0]), y[y == 0])) > 0.6
    assert edit.report.edited.before < 0.1


def test_a_rule_by_outputs_serves_every_way_to_ask(trained):
    trainer, module, loader, x, y = trained
    SEEN.clear()
    options = {"rule": "most_active", "ratio": 0.5, "layers": ["first"], "kept_bound": 1e9}
    edit = trainer.relabel(torch.arange(8), 1 - y[:8], module, loader, **options)
    selection = InfluenceModule(module).select_parameters(torch.arange(8), loader, **options)
    [(means, _), _] = scores_by_hand(copy.deepcopy(module), x[:8], y[:8])
    torch.testing.assert_close(SEEN[1, 6, 4], means, rtol=1e-4, atol=1e-5)
    row = int(means.argmax())
    assert selection.masks["first"].nonzero().tolist() == [[0, row, column] for column in range(4)]
    assert edit.changes["first.weight"].index.tolist() == [3 * row, 3 * row + 1, 3 * row + 2]
    assert edit.report.edited.after < edit.report.edited.before


def test_a_direction_serves_and_has_to_return_a_solve(trained):
    trainer, module, loader, _, y = trained
    assert "mine" in direction_names()
    options = {"method": "mine", "ratio": 0.5, "kept_bound": 1e9}
    edit = trainer.forget(y == 0, module, loader, **options)
    assert edit.report.method == "mine"
    assert edit.report.edited.after > edit.report.edited.before
    with pytest.raises(TypeError, match=r"Direction 'wrong' returned Tensor; accepted is a SubsetSolution"):
        trainer.forget(y == 0, module, loader, method="wrong")


@pytest.mark.parametrize("register", [register_rule, register_direction])
def test_registering_without_a_name_or_anything_to_register(register):
    with pytest.raises(TypeError, match="accepted is the name"):
        register(solve_by_diagonal)
    with pytest.raises(TypeError, match=r"to register as .* 'nothing'; accepted is a"):
        register("nothing")(None)
    assert "nothing" not in [*rule_names(), *direction_names()]


def test_an_unknown_name_lists_those_of_ones_own(trained):
    trainer, module, loader, _, _ = trained
    with pytest.raises(ValueError, match=r"accepted are .*'mine'"):
        trainer.forget([0], module, loader, rule="yours")
    with pytest.raises(ValueError, match=r"accepted are .*'mine'"):
        trainer.forget([0], module, loader, method="yours")
