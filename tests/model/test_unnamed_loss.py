"""Losses without a name from end to end: passes of second derivatives, and questions asked of a Trainer."""

import pytest
import torch
from drive import mute
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceTrainer
from lightning_influence.curvature.differentiation import add_gauss_newton_products
from lightning_influence.curvature.hessian import DenseHessianPass
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import find_layers
from lightning_influence.support.errors import UnsupportedModelError

N, Q = 18, 4


class Regression(LightningModule):
    """Student's and a log-cosh loss of two outputs, with a penalty on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        return (torch.log1p((f[:, 0] - y).square() / 4) + (f[:, 1] - y).cosh().log()).mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1]) + 0.01 * sum(p.square().sum() for p in self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return x, torch.randn(count, dtype=torch.float64, generator=generator)


def matrix_order(module: Regression, value) -> Tensor:
    """Gradient of a scalar as one vector, layer by layer, each weight with its bias as last column."""
    rows = torch.autograd.grad(
        value, list(module.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([
        torch.cat([w, b[:, None]], 1).flatten() for w, b in zip(rows[::2], rows[1::2], strict=True)
    ])


def gradients(module: Regression, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([
        matrix_order(module, module.loss(module(x[n : n + 1]), y[n : n + 1])) for n in range(len(x))
    ])


def gauss_newton(module: Regression, x: Tensor, y: Tensor) -> Tensor:
    """Average of J^T H J with the positive part of each example's Hessian in the outputs."""
    total = 0
    for n in range(len(x)):
        outputs = module(x[n : n + 1])
        jacobian = torch.stack([matrix_order(module, output) for output in outputs[0]])
        hessian = torch.func.hessian(lambda f, n=n: module.loss(f[None], y[n : n + 1]))(outputs[0].detach())
        values, vectors = torch.linalg.eigh(hessian)
        total = total + jacobian.T @ (vectors * values.clamp_min(0)) @ vectors.T @ jacobian / len(x)
    return total


def test_second_derivatives_of_the_values_are_those_of_the_loss():
    torch.manual_seed(0)
    module = mute(Regression())
    x, y = data(6, 0)
    one_pass = DenseHessianPass(find_layers(module))
    one_pass.step(module, (x, y), torch.arange(6), 0)
    names = [name for name, _ in module.named_parameters()]
    start = [p.detach() for p in module.parameters()]

    def value(*parameters: Tensor) -> Tensor:
        outputs = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return module.loss(outputs, y)

    blocks = torch.autograd.functional.hessian(value, tuple(start))
    sizes = [p.numel() for p in start]
    rows = [
        torch.cat([block.reshape(own, other) for block, other in zip(row, sizes, strict=True)], 1)
        for row, own in zip(blocks, sizes, strict=True)
    ]
    whole = torch.cat(rows)
    # Parameters stand in another order in the layout, which changes no eigenvalue.
    torch.testing.assert_close(torch.linalg.eigvalsh(one_pass.result()), torch.linalg.eigvalsh(whole))


def test_gauss_newton_products_are_those_of_the_positive_part():
    torch.manual_seed(0)
    module, (x, y) = mute(Regression()), data(6, 0)
    plan = find_layers(module)
    captured = Forward(plan)(module, (x, y), 6)
    vectors = torch.eye(plan.numel, dtype=torch.float64)
    out = torch.zeros_like(vectors)
    add_gauss_newton_products(out, plan, captured, vectors)
    torch.testing.assert_close(out / 6, gauss_newton(module, x, y))


@pytest.mark.filterwarnings("ignore:The training loss is not convex")
def test_scores_of_a_trainer():
    torch.manual_seed(0)
    module, (x, y), (qx, qy) = Regression(), data(N, 0), data(Q, 1)
    trainer = InfluenceTrainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train, queries = DataLoader(TensorDataset(x, y), 5), DataLoader(TensorDataset(qx, qy), 3)
    trainer.fit(module, train)
    module.eval()
    own, asked = gradients(module, x, y), gradients(module, qx, qy)
    plain = trainer.influence(module, train, queries, method="identity", log=False).scores.double()
    torch.testing.assert_close(plain, asked @ own.T / N, rtol=1e-5, atol=1e-8)
    exact = trainer.influence(module, train, queries, method="exact", damping=0.1, log=False).scores.double()
    matrix = gauss_newton(module, x, y) + 0.1 * torch.eye(own.shape[1], dtype=torch.float64)
    torch.testing.assert_close(exact, asked @ torch.linalg.solve(matrix, own.T) / N, rtol=1e-5, atol=1e-8)


class Routed(nn.Module):
    """Examples are sent to one of two layers by a mask, under a loss without a name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        chosen = x[:, 0] > 0
        outputs = torch.zeros_like(y)
        for layer, rows in ((self.left, chosen), (self.right, ~chosen)):
            if rows.any():
                outputs = outputs.index_add(0, rows.nonzero()[:, 0], layer(x[rows])[:, 0])
        return (outputs - y).cosh().log().mean()


def test_a_batch_that_takes_another_way_through_the_model_is_cut_anew():
    """The first batch knows one of the layers only, the last the other one."""
    module = mute(Routed())
    plan = find_layers(module)
    run = Forward(plan)
    for signs in ([1, 1, 1, 1], [1, -1, -1, 1], [-1, 1, 1, 1], [-1, -1, -1, -1]):
        x, y = data(4, 3)
        x[:, 0] = x[:, 0].abs() * torch.tensor(signs)
        found = run(module, (x, y), 4).loss_gradients()
        for n in range(4):
            loss = module.training_step((x[n : n + 1], y[n : n + 1]), 0)
            for name, layer in plan.layers.items():
                expected = layer.from_parameters(
                    *torch.autograd.grad(
                        loss,
                        [layer.module.weight, layer.module.bias],
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                )
                dense = found[name].dense()[0, n] if name in found else torch.zeros_like(expected)
                torch.testing.assert_close(dense, expected)


def test_a_step_that_calls_other_modules_each_time_is_refused():
    class Alternating(Routed):
        count = 0

        def training_step(self, batch, batch_idx):
            self.count += 1
            outputs = self.left(batch[0])[:, 0]
            if self.count % 2:
                outputs = outputs + self.right(batch[0])[:, 0]
            return (outputs - batch[1]).cosh().log().mean()

    module = mute(Alternating())
    with pytest.raises(UnsupportedModelError, match=r"other modules each time.*influence_loss"):
        Forward(find_layers(module))(module, data(4, 3), 4)
