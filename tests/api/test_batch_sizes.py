"""Batches are how the data are read: whatever is drawn at random, their size changes no score."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from two_processes import check_script

from lightning_influence import InfluenceModule

pytestmark = pytest.mark.filterwarnings("ignore:.*tolerance", "ignore:.*answer of", "ignore:.*does not use")
COUNT = 70
QUESTIONS = {
    "ekfac": {"method": "ekfac"},
    "ekfac, wide": {"method": "ekfac", "hidden": 40},
    "ekfac, sampled": {"method": "ekfac", "fisher": "sampled"},
    "kfac": {"method": "kfac"},
    "diagonal": {"method": "diagonal", "fisher": "sampled"},
    "auto": {"method": "auto"},
    "auto, wide": {"method": "auto", "hidden": 40},
    "auto, iterated": {"method": "auto", "tolerance": 1e-6, "max_steps": 20},
    "exact, mixed": {"method": "exact", "fisher": "mixed"},
    "blocks, sampled": {"method": "block_ggn", "fisher": "sampled"},
    "cg, mixed": {"method": "cg", "fisher": "mixed"},
    "cg, passes": {"method": "cg", "fisher": "sampled", "memory_budget": 20_000, "max_steps": 2},
    "lissa": {"method": "lissa", "batch_size": 8, "max_steps": 30},
    "astra": {"method": "astra", "batch_size": 8, "max_steps": 30},
}
LOSSES = {
    "cross_entropy": lambda outputs, y: F.cross_entropy(outputs, y),
    "mse": lambda outputs, y: F.mse_loss(outputs, F.one_hot(y, 3).to(outputs)),
    "bce": lambda outputs, y: F.binary_cross_entropy_with_logits(outputs, F.one_hot(y, 3).to(outputs)),
    "smooth_l1": lambda outputs, y: F.smooth_l1_loss(outputs, F.one_hot(y, 3).to(outputs)),
}


class Net(LightningModule):
    def __init__(self, hidden=6, loss="cross_entropy"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3))
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return LOSSES[self.loss](self.net(batch[0]), batch[1])


def data(count, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, dtype=torch.float64, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(count) % 3), batch_size=batch_size)


def ask(batch_size, question, queries=30, loss="cross_entropy", shuffle=False):
    options = {"damping": 0.1, **question}
    module = InfluenceModule(Net(options.pop("hidden", 6), loss).double())
    train = data(COUNT, batch_size, 1)
    if shuffle:
        train = DataLoader(train.dataset, batch_size=batch_size, shuffle=True)
    return module.scores(train, data(queries, 16, 2), **options)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "cg, passes" else name for name in QUESTIONS],
)
def test_scores_do_not_depend_on_the_batch_size(name):
    found = {size: ask(size, QUESTIONS[name]) for size in (7, 32)}
    torch.testing.assert_close(found[7].scores, found[32].scores, rtol=1e-6, atol=1e-9)
    if name in {"ekfac", "exact, mixed", "lissa", "auto"}:
        other = ask(32, {**QUESTIONS[name], "seed": 1, "fisher": "sampled"})
        assert not torch.allclose(other.scores, found[32].scores, rtol=1e-3)


@pytest.mark.grid
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fisher", ["mixed", "sampled"])
def test_no_loss_draws_by_batch(loss, fisher):
    found = [
        ask(size, {"method": "ekfac", "fisher": fisher}, queries=4, loss=loss, shuffle=size == 9).scores
        for size in (7, 32, 9)
    ]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["ekfac", "auto"])
def test_self_influence_does_not_depend_on_the_batch_size(method):
    found = [
        InfluenceModule(Net().double())
        .self_influence(data(COUNT, size, 1), method=method, damping=0.1)
        .scores
        for size in (7, 32)
    ]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


SCRIPT = """
import sys, warnings
import torch
from test_batch_sizes import QUESTIONS, Net, ask, data
from lightning_influence import InfluenceTrainer

torch.set_num_threads(1)
warnings.simplefilter("ignore")
trainer = InfluenceTrainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
)
for name, question in QUESTIONS.items():
    options = {"damping": 0.1, **question}
    module = Net(options.pop("hidden", 6)).double()
    ours = trainer.influence(module, data(70, 16, 1), data(30, 16, 2), log=False, **options)
    torch.testing.assert_close(ours.scores, ask(32, question).scores, rtol=1e-5, atol=1e-9, msg=name)
"""


@pytest.mark.slow
def test_two_processes_draw_as_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    check_script(f"import sys; sys.path.insert(0, {str(__file__.rpartition('/')[0])!r})\n{SCRIPT}", tmp_path)
