"""Every warning that is given while a question runs is in the answer's certificate, once."""

import ast
import warnings

import pytest
import torch
from house import MODULES
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_influence import InfluenceModule, InfluenceWarning

N = 24
DATA = TensorDataset(
    torch.randn(N, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(N) % 3
)


class Net(LightningModule):
    def __init__(self, loss, augment=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss, self.augment = nn.Linear(5, 3).double(), loss, augment

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(self.augment(batch[0])), batch[1])


def focal(outputs, labels):
    p = (4 * outputs).softmax(1).gather(1, labels[:, None])
    return (-((1 - p) ** 2) * p.log()).mean()


def noise(x):
    return x + torch.randn_like(x)


def other_loss(module, batch):
    return module.net(batch[0]).square().mean(1)


def ask(module, **options):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        answer = module.scores(DataLoader(DATA, 8), DataLoader(DATA, 8), **options)
    return answer, [str(w.message) for w in told if issubclass(w.category, InfluenceWarning)]


CASES = {
    "noise": (Net(nn.functional.cross_entropy, noise), {"method": "identity"}, "differ from call to call"),
    "noise, ekfac": (
        Net(nn.functional.cross_entropy, noise),
        {"method": "ekfac"},
        "differ from call to call",
    ),
    "another loss": (
        Net(nn.functional.cross_entropy),
        {"method": "ekfac", "loss": other_loss},
        "is not the loss of `training_step`",
    ),
    "not convex": (Net(focal), {"method": "exact", "damping": 0.1}, "not convex"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_warned_of_is_in_the_certificate(name):
    module, options, text = CASES[name]
    answer, told = ask(InfluenceModule(module), **options)
    notes = list(answer.diagnostics.warnings)
    assert sum(text in note for note in notes) == 1
    assert len(set(told)) == len(told)  # each once
    assert set(told) <= set(notes)
    assert len(set(notes)) == len(notes)


def test_loaders_and_spectra_are_heard_too():
    module = InfluenceModule(Net(nn.functional.cross_entropy))
    sampler = WeightedRandomSampler(torch.arange(1.0, N + 1), N)
    with pytest.warns(InfluenceWarning, match="more often"):
        answer = module.self_influence(DataLoader(DATA, 8, sampler=sampler), damping=0.1)
    assert any("more often" in note for note in answer.diagnostics.warnings)


def test_later_questions_tell_what_was_found_before_without_warning_again():
    module = InfluenceModule(Net(nn.functional.cross_entropy, noise))
    first, told = ask(module, method="identity")
    second, again = ask(module, method="identity")
    assert len(told) == 1
    assert not again
    assert list(second.diagnostics.warnings) == list(first.diagnostics.warnings) == told


def test_nothing_is_heard_once_a_question_has_ended():
    module = InfluenceModule(Net(nn.functional.cross_entropy))
    answer, _ = ask(module, method="identity")
    from lightning_influence.support.notes import _LISTENERS, warn

    with pytest.warns(InfluenceWarning, match="afterwards"):
        warn("afterwards")
    assert not _LISTENERS
    assert not answer.diagnostics.warnings


# Their warnings come after an answer, or beside one; edits keep theirs in the report.
OWN_WAYS = ("support.notes", "edits.", "results.", "api.command_line.")


def test_warnings_are_given_where_questions_hear_them():
    for name, path in MODULES.items():
        if name.removeprefix("lightning_influence.").startswith(OWN_WAYS):
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        direct = [node.lineno for node in calls if ast.unparse(node.func) == "warnings.warn"]
        assert not direct, f"{name}:{direct} warns beside support.notes.warn"
