"""method='hessian': the exact Hessian, and what becomes of its negative curvature."""

from __future__ import annotations

import lightning
import oracle
import pytest
import torch
from influence_cases import CLOSE, DAMPING, Asked, gradients, quiet
from influence_models import Net, fitted, queries, train
from models import CASES
from torch import nn

from lightning_influence import InfluenceModule
from lightning_influence.support.errors import InfluenceWarning, NonFiniteError, UnsupportedModelError

NAME = "mlp_gelu"  # its Hessian is indefinite at random weights, and so is the Hessian plus DAMPING


def problem(name):
    case = CASES[name]
    return case.model, case.loss, case.x, case.y, case.layers


def expected(name, replace, damping=DAMPING):
    H = oracle.hessian(*problem(name))
    values, vectors = torch.linalg.eigh(H)
    changed = vectors @ torch.diag(replace(values)) @ vectors.T
    return oracle.influence(changed, damping, gradients(name, "loss"), gradients(name))


REPLACED = {"absolute": torch.abs, "clip": lambda v: v.clamp_min(0), "keep": lambda v: v}


@pytest.mark.parametrize("how", REPLACED)
def test_negative_curvature(how):
    asked = Asked(CASES[NAME])
    H = oracle.hessian(*problem(NAME))
    assert torch.linalg.eigvalsh(H).min() < -0.1 * DAMPING
    found = asked.scores(method="hessian", negative_curvature=how)
    torch.testing.assert_close(found.scores, expected(NAME, REPLACED[how]), **CLOSE)
    count = int((torch.linalg.eigvalsh(H) < -1e-12).sum())
    assert found.diagnostics.extra["negative_curvature"].startswith(
        f"{count} of {len(H)} eigenvalues are neg"
    )
    assert found.diagnostics.residuals.max() < 1e-8


def test_refusing_names_the_smallest_eigenvalue_and_what_to_do():
    asked = Asked(CASES[NAME])
    smallest = float(torch.linalg.eigvalsh(oracle.hessian(*problem(NAME))).min())
    options = {"method": "hessian", "negative_curvature": "refuse"}
    with pytest.raises(
        UnsupportedModelError, match=rf"not positive definite: .* is {smallest:.3g}.*'absolute'"
    ):
        asked.scores(damping=-0.5 * smallest, **options)
    loader, bare = [(CASES[NAME].x, CASES[NAME].y)], InfluenceModule(asked.module.model)
    options["damping"] = -0.5 * smallest
    with pytest.warns(InfluenceWarning, match="dominated by directions of hardly any curvature"):
        bare.scores(loader, loader, **{**options, "negative_curvature": "keep"})
    options["damping"] = -2 * smallest
    enough = asked.scores(**options)
    torch.testing.assert_close(enough.scores, expected(NAME, REPLACED["keep"], -2 * smallest), **CLOSE)


@pytest.mark.parametrize("name", ["linear", "linear_mse"])
def test_it_is_the_gauss_newton_matrix_of_a_linear_model(name):
    asked = Asked(CASES[name])
    for how in (*REPLACED, "refuse"):
        found = asked.scores(method="hessian", negative_curvature=how)
        torch.testing.assert_close(found.scores, asked.expected("exact"), **CLOSE)
        assert found.diagnostics.extra["negative_curvature"].startswith("none")


@pytest.mark.parametrize("damping", ["heuristic", "auto"])
def test_damping_is_a_share_of_the_magnitudes(damping):
    asked = Asked(CASES[NAME])
    found = asked.scores(method="hessian", damping=damping)
    values, vectors = torch.linalg.eigh(oracle.hessian(*problem(NAME)))
    diagonal = torch.diagonal(vectors @ torch.diag(values.abs()) @ vectors.T)
    owner = oracle.layer_of_parameter(CASES[NAME].model, CASES[NAME].layers)
    means = torch.stack([diagonal[owner == layer].mean() for layer in owner.unique()])
    wanted = 0.1 * means if damping == "heuristic" else means.mean().expand(len(means))
    got = torch.tensor(list(found.diagnostics.damping.values()), dtype=torch.float64)
    torch.testing.assert_close(got, wanted)
    vector = wanted[owner]
    torch.testing.assert_close(found.scores, expected(NAME, torch.abs, vector), **CLOSE)


@pytest.mark.parametrize("method", ["hessian", "block_ggn"])
def test_from_a_trainer(method):
    host, module = fitted()
    with quiet():
        mine = host.influence(module, train(), queries(), method=method, log=False)
        own = host.self_influence(module, train(), method=method, log=False)
        alone = InfluenceModule(module).scores(train(), queries(), method=method, damping=0.1)
        same = host.influence(module, train(), queries(), method=method, damping=0.1, log=False)
    recorded = mine.diagnostics.damping_origin
    assert "steps of SGD" in recorded
    assert ("of each layer's mean eigenvalue" in recorded) == (method == "block_ggn")
    assert own.scores.shape == (22,)
    assert own.scores.min() >= 0
    torch.testing.assert_close(same.scores, alone.scores, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["hessian", "block_ggn"])
def test_a_model_that_is_too_large_is_refused_before_any_pass(method):
    class Loud(Net):
        def training_step(self, batch, batch_idx):
            raise AssertionError("a pass was run")

    with pytest.raises(
        UnsupportedModelError, match=f"method='{method}' would build a dense .* at most 20 para"
    ):
        InfluenceModule(Loud()).scores(train(), queries(), method=method, max_parameters=20)


def test_weights_and_gradients_are_as_before():
    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.body[0].bias.requires_grad_(False)

    module = Frozen()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with quiet():
        found = InfluenceModule(module).scores(train(), queries(), method="hessian", damping=0.1)
    assert found.diagnostics.layers["body.0"] == 20  # its bias is not trained
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert module.training


class OwnLoss(lightning.LightningModule):
    """A loss that no known function computes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1).double()

    def influence_loss(self, batch):
        return (self.layer(batch[0])[:, 0] - batch[1]).cosh().log()


@pytest.mark.parametrize("method", ["exact", "block_ggn", "hessian"])
def test_a_loss_that_no_known_function_computes_has_its_second_derivative(method):
    batch = [(torch.randn(6, 3).double(), torch.randn(6).double())]
    module = InfluenceModule(OwnLoss())
    x = torch.cat([batch[0][0], torch.ones(6, 1).double()], dim=1)
    weight = torch.cat([module.model.layer.weight[0], module.model.layer.bias]).detach()
    error = x @ weight - batch[0][1]
    H = (x.T * (1 - error.tanh() ** 2)) @ x / 6
    g = error.tanh()[:, None] * x
    found = module.scores(batch, batch, method=method, damping=0.1)
    torch.testing.assert_close(found.scores, oracle.influence(H, 0.1, g, g), **CLOSE)


class Copied(Net):
    """Its curvature is singular: it sees the same input twice."""

    def forward(self, x):
        return super().forward(torch.cat([x[:, :1], x[:, :1], x[:, 2:]], dim=1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


SINGULAR = [("exact", {}), ("block_ggn", {}), *(("hessian", {"negative_curvature": how}) for how in REPLACED)]


@pytest.mark.grid
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("method", "options"), SINGULAR)
def test_a_singular_curvature_without_damping_is_refused(method, options, double):
    module = Copied().double() if double else Copied()
    batches = [(x.double() if double else x, y) for x, y in train()]
    asked = InfluenceModule(module)
    for ask in (asked.scores, asked.self_influence):
        with quiet(), pytest.raises(NonFiniteError, match=r"singular at damping 0 to 0\. Use a positive"):
            ask(*[batches] * (2 if ask == asked.scores else 1), method=method, damping=0.0, **options)


def test_damping_below_the_rounding_of_the_hessian_is_told():
    asked = InfluenceModule(Copied())
    with pytest.warns(InfluenceWarning, match=r"\(1e-12\) has an eigenvalue of about 1e-12, and .* float32"):
        asked.scores(train(), train(), method="hessian", damping=1e-12)
    found = asked.scores(train(), train(), method="hessian", damping=1e-3)
    assert not any("rounding" in note for note in found.diagnostics.warnings)
    assert found.diagnostics.residuals.max() < 1e-9
