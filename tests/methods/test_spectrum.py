"""InfluenceModule.spectrum against the eigenvalues of the oracle's matrices."""

from __future__ import annotations

import warnings

import oracle
import pytest
import torch
from influence_cases import quiet
from influence_models import Net, train
from models import CASES, lightning_module, loader
from torch import nn
from torch.nn import functional

from lightning_influence import InfluenceModule
from lightning_influence.support.errors import InfluenceWarning

NAMES = ["mlp_gelu", "mlp_relu_inplace_weighted", "tokens_weighted", "conv2d_reflect_groups"]


def ask(name, curvature, **settings):
    module = InfluenceModule(lightning_module(CASES[name]))
    with quiet():
        return module.spectrum(loader(CASES[name], 5, shuffle=True), curvature, **settings)


def eigenvalues(name, curvature):
    case = CASES[name]
    H = getattr(oracle, curvature)(case.model, case.loss, case.x, case.y, case.layers)
    return torch.linalg.eigvalsh(H).flip(0)


@pytest.mark.grid
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_models(name, curvature):
    truth = eigenvalues(name, curvature)
    found = ask(name, curvature, probes=8, steps=5)
    assert found.numel == len(truth)
    assert found.passes <= 7  # fewer for a matrix of low rank
    for own, value in zip(found.eigenvalues[:3], truth, strict=False):
        assert -1e-12 <= float(value) - own.value <= own.error + 1e-12
        assert own.error < 0.25 * float(value)
    assert abs(found.trace.value - float(truth.sum())) <= 5 * found.trace.error + 1e-9
    assert abs(found.square_trace.value - float(truth.square().sum())) <= 5 * found.square_trace.error + 1e-9
    assert found.smallest.value >= float(truth[-1]) - 1e-12
    # The whole space: everything is exact.
    whole = ask(name, curvature, probes=8, steps=60)
    assert whole.trace.value == pytest.approx(float(truth.sum()), rel=1e-9)
    assert whole.square_trace.value == pytest.approx(float(truth.square().sum()), rel=1e-9)
    assert whole.stable_rank.value == pytest.approx(float(truth.sum() / truth.abs().max()), rel=1e-6)
    assert whole.smallest.value == pytest.approx(float(truth[-1]), abs=1e-9)
    for own, value in zip(whole.eigenvalues, truth, strict=False):
        assert own.value == pytest.approx(float(value), abs=1e-9)


def test_batches_and_seeds():
    module = InfluenceModule(lightning_module(CASES["tokens_weighted"]))
    settings = {"probes": 3, "steps": 2}
    found = [
        module.spectrum(loader(CASES["tokens_weighted"], batch), seed=seed, **settings)
        for batch, seed in ((1, 0), (12, 0), (12, 1))
    ]
    assert found[0].trace.value == pytest.approx(found[1].trace.value, rel=1e-9)
    assert found[2].trace.value != found[1].trace.value


def test_variance_of_examples():
    case = CASES["mlp_gelu"]
    found = ask("mlp_gelu", "ggn", probes=4, steps=5, minibatches=200)
    assert found.passes == 8
    h = torch.stack([
        oracle.ggn(case.model, case.loss, x, y, case.layers)
        for x, y in zip(case.x[:, None], case.y[:, None], strict=True)
    ])
    values, vectors = torch.linalg.eigh(h.mean(0))
    ratios = [(h @ v).square().sum(1).mean() / (values.sum() * (v @ h.mean(0) @ v)) for v in vectors.T[-4:]]
    assert abs(found.example_variance.value - float(max(ratios))) < 4 * found.example_variance.error
    assert any("kappa" in name for name, _ in found.facts())


def test_one_example_has_no_variance():
    batch = [(torch.randn(1, 4), torch.tensor([1]))]
    with pytest.warns(InfluenceWarning, match="needs at least 2 examples .* there are 1"):
        found = InfluenceModule(Net()).spectrum(batch, probes=2, steps=2, minibatches=3)
    assert found.example_variance is None


def test_the_model_is_left_as_it_was_and_single_precision_serves():
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    found = InfluenceModule(model).spectrum(train(), "hessian", probes=2, steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert model.training
    other = InfluenceModule(Net()).spectrum(train(), layers=["body.0"], probes=2, steps=3)
    assert (found.numel, other.numel) == (43, 25)


def test_memory_bounds_the_steps():
    with pytest.warns(InfluenceWarning, match=r"kept to 2 of 8 steps of 2 vectors.*Raise `memory_budget`"):
        found = InfluenceModule(Net()).spectrum(train(), probes=2, memory_budget=2 * 2 * 43 * 4 * 3)
    assert found.passes == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": "fisher"}, "Got curvature='fisher'; accepted are 'ggn', 'hessian'"),
        ({"probes": 1}, "Got probes=1; accepted are integers of at least 2"),
        ({"steps": 2.0}, "Got steps=2.0; accepted are integers of at least 1"),
        ({"minibatches": -1}, "Got minibatches=-1; accepted are integers of at least 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        InfluenceModule(Net()).spectrum(train(), **settings)


def test_layers_that_take_no_part_have_no_spectrum():
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(2, 2)

    with pytest.warns(InfluenceWarning, match="idle.* took no part in the training loss"):
        found = InfluenceModule(Idle()).spectrum(train(), probes=2, steps=2)
    assert found.numel == 43


class OwnLoss(Net):
    """A loss that no known function computes."""

    def influence_loss(self, batch):
        return (self(batch[0]) - functional.one_hot(batch[1], 3)).cosh().log().sum(1)


@pytest.mark.filterwarnings("ignore:.influence_loss. is not the loss of")
def test_a_loss_of_a_hooks_own_has_its_second_derivatives():
    module = InfluenceModule(OwnLoss())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*Gauss-Newton matrix is not known.*")
        estimate = module.spectrum(train(), probes=2, steps=30)
    trace = module.scores(train(), train(), method="exact", damping="heuristic").diagnostics.damping
    sizes = module.scores(train(), train(), method="exact", damping=1.0).diagnostics.layers
    assert estimate.trace.value == pytest.approx(10 * sum(trace[k] * sizes[k] for k in sizes), rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        module.spectrum(train(), "hessian", probes=2, steps=2)
