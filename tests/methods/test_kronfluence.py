"""A second reference beside the oracle: kronfluence's EK-FAC on a small net of Linear layers.

Both use the empirical Fisher, so that no label is drawn, the same damping for all layers, and float64.
kronfluence's scores have our sign and lack our 1/N: they are ``g_q^T (.)^{-1} g_n``.
"""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule

kronfluence = pytest.importorskip(
    "kronfluence", reason="kronfluence is not installed: pip install --no-deps kronfluence==1.0.1"
)
N, Q, DAMPING = 40, 6, 1e-2


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))


class Wrapped(LightningModule):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = make_net().double()
    inputs = torch.randn(N + Q, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (N + Q,), generator=generator)
    tables = TensorDataset(inputs[:N], targets[:N]), TensorDataset(inputs[N:], targets[N:])
    return net, *tables


def arguments():
    from kronfluence.arguments import FactorArguments, ScoreArguments

    double = torch.float64
    factors = FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=True,
        eigendecomposition_dtype=double,
        activation_covariance_dtype=double,
        gradient_covariance_dtype=double,
        per_sample_gradient_dtype=double,
        lambda_dtype=double,
    )
    scores = ScoreArguments(
        damping_factor=DAMPING,
        score_dtype=double,
        per_sample_gradient_dtype=double,
        precondition_dtype=double,
    )
    return factors, scores


def their_scores(net: nn.Module, train: TensorDataset, queries: TensorDataset, folder: Path):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class CrossEntropy(Task):
        def compute_train_loss(self, batch, model, sample=False):
            assert not sample, "the empirical Fisher draws no labels"
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    task = CrossEntropy()
    factor_args, score_args = arguments()
    analyzer = Analyzer(
        "reference", prepare_model(net, task), task, cpu=True, disable_tqdm=True, output_dir=str(folder)
    )
    analyzer.fit_all_factors("factors", train, per_device_batch_size=16, factor_args=factor_args)
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        query_dataset=queries,
        train_dataset=train,
        per_device_query_batch_size=Q,
        per_device_train_batch_size=16,
        score_args=score_args,
    )
    analyzer.compute_self_scores(
        "self", "factors", train_dataset=train, per_device_train_batch_size=16, score_args=score_args
    )
    pairwise, own = analyzer.load_pairwise_scores("scores"), analyzer.load_self_scores("self")
    return pairwise["all_modules"], own["all_modules"]


@pytest.mark.slow
def test_ekfac_equals_kronfluence(problem, tmp_path):
    net, train, queries = problem
    module = InfluenceModule(Wrapped(net))
    options = {"method": "ekfac", "fisher": "empirical", "damping": DAMPING}
    train_loader, query_loader = DataLoader(train, batch_size=13), DataLoader(queries, batch_size=Q)
    ours = module.scores(train_loader, query_loader, low_rank_tolerance=0.0, **options).scores
    our_self = module.self_influence(train_loader, **options).scores

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, their_self = their_scores(copy.deepcopy(net), train, queries, tmp_path)

    # Float64 throughout on both sides; what is left is the order of summation and of eigendecompositions.
    torch.testing.assert_close(ours * N, theirs.to(ours), rtol=1e-8, atol=1e-8 * float(theirs.abs().max()))
    torch.testing.assert_close(our_self * N, their_self.to(ours), rtol=1e-8, atol=0.0)
    # Not by being trivial: without the curvature the ranking is another one.
    plain = module.scores(train_loader, query_loader, method="identity").scores
    correlation = torch.corrcoef(torch.stack([ours.flatten(), plain.flatten()]))[0, 1]
    assert correlation < 0.99
