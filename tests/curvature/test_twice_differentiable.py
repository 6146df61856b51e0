"""Functions whose second derivatives torch lacks or has wrong, against finite differences."""

import pytest
import torch
from drive import mute
from torch import nn
from torch.autograd import gradgradcheck
from torch.nn import functional as F
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from lightning_influence.curvature.hessian import DenseHessianPass, HessianProductPass
from lightning_influence.curvature.twice_differentiable import differentiable_twice
from lightning_influence.model.layers.plan import Layout, find_layers
from lightning_influence.support.errors import InfluenceWarning


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda v, g: torch._weight_norm(v, g, 0), [(3, 4), (3, 1)]),
        (lambda v, g: torch._weight_norm(v, g, 1), [(3, 4), (1, 4)]),
        (lambda v, g: torch._weight_norm(v, g, 0), [(3, 2, 2), (3, 1, 1)]),
        (lambda v, g: torch._weight_norm(v, g.reshape(()), -1), [(3, 4), (1,)]),
        (F.hardsigmoid, [(3, 4)]),
        (lambda x: F.hardsigmoid(x * 1, inplace=True), [(3, 4)]),
    ],
)
def test_functions(function, shapes):
    inputs = [draw(*shape) for shape in shapes]
    with differentiable_twice(nn.Identity()):
        plain = function(*inputs)
        assert gradgradcheck(function, inputs)
    torch.testing.assert_close(plain, function(*inputs))


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.last = norm(nn.Conv1d(2, 3, 2)), norm(nn.Linear(3, 2))
        self.gate = nn.Hardsigmoid(inplace=True)

    def training_step(self, batch, batch_idx):
        hidden = torch.tanh(self.first(batch[0])).mean(2)
        return F.cross_entropy(self.last(hidden * self.gate(2 * hidden)), batch[1])


@pytest.mark.parametrize("norm", [weight_norm, old_weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_hessian_of_a_weight_normed_model(norm):
    """By central differences of the gradient."""
    module, batch = mute(Net(norm).double()), (draw(6, 2, 4).detach(), torch.arange(6) % 2)
    plan = find_layers(module)
    passed = DenseHessianPass(plan)
    passed.step(module, batch, torch.arange(6), 0)
    found, layout = passed.result(), Layout.of(plan.layers)
    parameters = list(module.parameters())

    def gradient():
        grads = torch.autograd.grad(module.training_step(batch, 0), parameters)
        return torch.cat([grad.flatten() for grad in grads])

    rows = []
    for parameter in parameters:
        values = parameter.data.view(-1)
        for entry in range(len(values)):
            ends, kept = [], values[entry].item()
            for step in (1e-5, -1e-5):
                values[entry] = kept + step
                ends.append(gradient())
            values[entry] = kept
            rows.append((ends[0] - ends[1]) / 2e-5)
    expected = torch.stack(rows)
    assert layout.numel == len(expected)
    # Both have the parameters in an order of their own, which the values of the matrix do not depend on.
    torch.testing.assert_close(
        torch.linalg.eigvalsh(found), torch.linalg.eigvalsh((expected + expected.T) / 2), rtol=1e-6, atol=1e-8
    )


class Product(torch.autograd.Function):
    """A product of whose gradients autograd takes one for a constant."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * b, g * a.detach()


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.gate = nn.Linear(3, 2), nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        [x, y] = batch
        return F.cross_entropy(Product.apply(self.first(x), self.gate(x)), y)


def test_second_derivatives_that_are_not_symmetric_are_told():
    module, batch = mute(Custom().double()), (draw(6, 3).detach(), torch.arange(6) % 2)
    plan = find_layers(module)
    for passed in (
        DenseHessianPass(plan),
        HessianProductPass(plan, torch.randn(3, plan.numel, dtype=torch.float64)),
    ):
        passed.step(module, batch, torch.arange(6), 0)
        with pytest.warns(
            InfluenceWarning, match="second derivatives of the training loss are not symmetric"
        ):
            passed.result()
