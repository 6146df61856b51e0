"""A loss of a user's own, log-cosh: one class and one parser, as a project outside the package has them."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.overrides import wrap_torch_function
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceTrainer, InfluenceWarning
from lightning_influence.model.losses import ElementwiseLoss, register_loss

N, Q = 24, 5


@wrap_torch_function(lambda outputs, target, reduction="mean": (outputs, target))
def log_cosh(outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    values = (outputs - target).cosh().log()
    return values.mean() if reduction == "mean" else values.sum()


@dataclass(frozen=True, eq=False)
class LogCoshLoss(ElementwiseLoss):
    """log cosh(f - y), with the derivatives tanh and 1 - tanh^2."""

    def terms(self, outputs: Tensor) -> Tensor:
        return (outputs - self.goals).cosh().log()

    def slopes(self) -> Tensor:
        return (self.detached - self.goals).tanh()

    def bends(self) -> Tensor:
        return 1 - self.slopes().square()


@register_loss(log_cosh)
def parse_log_cosh(outputs: Tensor, target: Tensor, reduction: str = "mean") -> LogCoshLoss:
    return LogCoshLoss(outputs, target, len(outputs), reduction)


class Regression(LightningModule):
    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.net, self.reduction = nn.Linear(3, 2).double(), reduction

    def training_step(self, batch, batch_idx):
        return log_cosh(self.net(batch[0]), batch[1], self.reduction)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def per_example(module: Regression, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (n, P) and Hessians (n, P, P), which are Gauss-Newton blocks since the model is linear."""

    def value(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        terms = (flat[:6].view(2, 3) @ x + flat[6:] - y).cosh().log()
        return terms.mean() if module.reduction == "mean" else terms.sum()

    flat = torch.cat([module.net.weight.detach().flatten(), module.net.bias.detach()])
    along = (None, 0, 0)
    gradients = torch.func.vmap(torch.func.grad(value), along)(flat, x, y)
    return gradients, torch.func.vmap(torch.func.hessian(value), along)(flat, x, y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scores_with_a_loss_of_the_users_own(reduction):
    torch.manual_seed(0)
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)
    qx, qy = torch.randn(Q, 3, dtype=torch.float64), torch.randn(Q, 2, dtype=torch.float64)
    module, callback = Regression(reduction), InfluenceCallback()
    trainer = InfluenceTrainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    train = DataLoader(TensorDataset(x, y), 6)
    trainer.fit(module, train)
    scores = trainer.influence(
        module, train, DataLoader(TensorDataset(qx, qy), 2), method="exact", damping=0.1, log=False
    ).scores
    gradients, hessians = per_example(module, x, y)
    queries, _ = per_example(module, qx, qy)
    matrix = hessians.mean(0) + 0.1 * torch.eye(8, dtype=torch.float64)
    expected = queries @ torch.linalg.solve(matrix, gradients.T) / N
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-9)


class Named(Regression):
    """Calls the loss with names of its own for all arguments."""

    def training_step(self, batch, batch_idx):
        return log_cosh(outputs=self.net(batch[0]), target=batch[1], reduction=self.reduction)


@pytest.mark.parametrize("kind", [Regression, Named])
def test_a_fit_with_a_loss_of_the_users_own_is_watched(kind):
    x, y = torch.randn(N, 3).double(), torch.randn(N, 2).double()
    callback = InfluenceCallback(dynamics=True)
    trainer = InfluenceTrainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=InfluenceWarning)
        trainer.fit(kind("mean"), DataLoader(TensorDataset(x, y), 8))
    assert callback.num_collected
    assert len(trainer.training_dynamics().loss_mean) == N
