"""Residuals are those of the answers that are given, as float64 computes them."""

import pytest
import torch
from influence_models import names
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_influence import InfluenceModule

pytestmark = pytest.mark.filterwarnings("ignore:.*tolerance", "ignore:.*answer of")
DAMPING = 0.01


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def data(count, seed, dtype=torch.float32):
    x = 20 * torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return [(x.to(dtype), torch.arange(count) % 3)]


def matrix_and_gradients(queries):
    """The damped Gauss-Newton matrix (P, P) and the queries' gradients (Q, P), by autograd in float64."""
    net = Net().double().net
    parameters = dict(net.named_parameters())
    (x, _), (q, y) = data(40, 1, torch.float64)[0], queries

    def logits(values, x):
        return torch.func.functional_call(net, values, (x,))

    def flat(tree):
        return torch.cat([part.flatten(2 if part.ndim > 2 else 1) for part in tree.values()], dim=-1)

    jacobian = torch.cat([p.reshape(40, 3, -1) for p in torch.func.jacrev(logits)(parameters, x).values()], 2)
    p = logits(parameters, x).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    G = torch.einsum("nia,nij,njb->ab", jacobian, middle, jacobian) / 40
    rows = torch.func.jacrev(lambda values: F.cross_entropy(logits(values, q), y, reduction="none"))(
        parameters
    )
    return G + DAMPING * torch.eye(len(G)), torch.cat([r.reshape(len(q), -1) for r in rows.values()], 1)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("auto", {"tolerance": 1e-6, "max_steps": 30}),
        ("auto", {"tolerance": 1e-6, "max_steps": 2}),
        ("cg", {"tolerance": 1e-6, "max_steps": 100}),
        ("cg", {"tolerance": 1e-1, "max_steps": 4}),
        ("minres", {"tolerance": 1e-6, "max_steps": 100}),
        ("exact", {}),
    ],
)
def test_residuals_of_solutions_in_float32(method, options):
    queries = data(7, 2)[0]
    solved, diagnostics = InfluenceModule(Net()).ihvp(
        data(40, 1), [queries], method=method, damping=DAMPING, **options
    )
    A, v = matrix_and_gradients((queries[0].double(), queries[1]))
    x = torch.cat(
        [solved[f"net.{name}"].reshape(7, -1) for name in ("0.weight", "0.bias", "2.weight", "2.bias")], 1
    )
    true = (v - x.double() @ A).norm(dim=1) / v.norm(dim=1)
    # The gradients of the model in float32 are rounded, too: a few 1e-6 of what is large.
    torch.testing.assert_close(diagnostics.residuals.double(), true, rtol=0.3, atol=3e-5)


def test_auto_takes_one_product_more_where_rounding_shows():
    def ask(tolerance, dtype):
        return InfluenceModule(Net().to(dtype)).scores(
            data(40, 1, dtype),
            data(7, 2, dtype),
            method="auto",
            damping=DAMPING,
            tolerance=tolerance,
            max_steps=1,
        )

    def products(tolerance, dtype):
        found = ask(tolerance, dtype)
        assert found.diagnostics.extra["krylov_steps"] == [1]
        return names(found).count("curvature products")

    assert products(1e-6, torch.float32) == products(1e-6, torch.float64) + 1
    assert products(2e-2, torch.float32) == products(2e-2, torch.float64)


@pytest.mark.parametrize(
    ("method", "options"),
    [("auto", {"tolerance": 1e-5, "max_steps": 30}), ("cg", {"tolerance": 1e-5}), ("exact", {})],
)
def test_self_influence_has_residuals_and_is_the_diagonal(method, options):
    everyone = data(40, 1)
    asked = {"method": method, "damping": DAMPING, **options}
    found = InfluenceModule(Net()).self_influence(everyone, **asked)
    assert found.diagnostics.residuals.shape == (40,)
    assert bool(found.diagnostics.residuals.isfinite().all())
    double = data(40, 1, torch.float64)
    exact = InfluenceModule(Net().double()).self_influence(double, method="exact", damping=DAMPING).scores
    error = float((found.scores.double() - exact).norm() / exact.norm())
    assert error < 1e-3
    assert float(found.diagnostics.residuals.max()) < 1e-3
