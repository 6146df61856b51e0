"""Answers stay within their own size, and within the memory budget."""

import pytest
import torch
from lightning.pytorch import LightningModule
from live_tensors import LiveTensors
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*logging interval", "ignore:.*tolerance", "ignore:.*answer of"
)
MIB = 2**20


class Net(LightningModule):
    def __init__(self, inputs, hidden):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def data(count, inputs, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(count) % 3), batch_size=batch_size)


def ask(queries, examples, inputs=4, hidden=4, **options):
    module = InfluenceModule(Net(inputs, hidden))
    loaders = data(examples, inputs, 64, 1), data(queries, inputs, 50, 2)
    with LiveTensors() as live:
        found = module.scores(*loaders, damping=0.1, **options)
    return found, live.peak


def test_the_meter_sees_what_is_alive_at_once():
    with LiveTensors() as live:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b.view(10, 100) + b.view(10, 100).T.sum()
        del b, c
    assert live.peak == pytest.approx(8000, abs=400)
    assert live.now == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["identity", "auto", "cg"])
def test_full_scores_take_their_own_size(method):
    queries, examples = 400 if method == "cg" else 1000, 5000
    budget = 2 * MIB  # what is held beside the scores
    steps = {"max_steps": 1} if method == "cg" else {}
    found, peak = ask(queries, examples, method=method, memory_budget=budget, **steps)
    answer = found.scores.nbytes
    assert answer == 4 * queries * examples
    assert peak < 1.5 * answer + budget


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ekfac", "auto", "cg"])
def test_the_ends_of_rankings_take_the_memory_budget(method):
    inputs, hidden, queries, budget = 150, 200, 300, 24 * MIB
    options = {"method": method, "top_k": 4, "low_rank_tolerance": 0.0}
    options |= {"max_steps": 3} if method in {"cg", "minres"} else {}
    parameters = (inputs + 1) * hidden + (hidden + 1) * 3
    assert 4 * queries * parameters > 1.4 * budget  # gradients alone would not fit
    found, peak = ask(queries, 200, inputs, hidden, memory_budget=budget, **options)
    statistics = 10 * 4 * parameters  # of factors, and their eigenvectors
    assert peak < budget + statistics
    if method == "ekfac":
        whole, peak = ask(queries, 200, inputs, hidden, **options)
        assert peak > budget + statistics
        torch.testing.assert_close(found.top_scores, whole.top_scores, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_queries_of_a_dense_method_come_in_groups():
    inputs, hidden, queries, budget = 20, 20, 4000, 4 * MIB
    found, peak = ask(queries, 60, inputs, hidden, method="exact", top_k=4, memory_budget=budget)
    matrices = 4 * 8 * (21 * 20 + 21 * 3) ** 2
    assert peak < budget + matrices
    assert len(found.top_scores) == queries
