"""A rule for a layer of a user's own, whose parameters have names of their own."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer, register_layer
from lightning_influence.model.layers import layer as layers
from lightning_influence.model.layers.layer import LayerRule

N, Q = 24, 5


class Mixing(nn.Module):
    """A linear map that calls its parameters kernel and offset."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5)
        self.offset = nn.Parameter(torch.zeros(d_out))

    def forward(self, x):
        return x @ self.kernel.T + self.offset


class MixingRule(LayerRule):
    """As for a linear layer, under other names."""

    def shape(self, module):
        return 1, *module.kernel.shape

    def inputs(self, module, x, num_examples):
        return x.reshape(1, num_examples, -1, x.shape[-1])

    def output_gradients(self, module, grad, num_examples):
        return grad.reshape(1, num_examples, -1, grad.shape[-1])

    def weight(self, module):
        return module.kernel

    def bias(self, module):
        return module.offset


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Mixing(4, 6), nn.Tanh(), Mixing(6, 3)).double()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def make_loader(n):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(inputs, torch.arange(n) % 3), 6)


def gradients(module, loader):
    """Each example's gradient by automatic differentiation, ``(n, P)``."""
    inputs, labels = loader.dataset.tensors
    rows = []
    for x, y in zip(inputs, labels, strict=True):
        loss = nn.functional.cross_entropy(module.net(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    return torch.stack(rows)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """A registration lasts for the process, in which other tests list all that there are."""
    register_layer(Mixing)(MixingRule)
    yield
    del layers._RULES[Mixing]


@pytest.fixture
def fitted():
    torch.manual_seed(0)
    off = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer, module = InfluenceTrainer(max_epochs=2, callbacks=[InfluenceCallback()], **off), Net()
    trainer.fit(module, make_loader(N))
    return trainer, module


def test_scores_are_those_of_the_gradients(fitted):
    trainer, module = fitted
    answer = trainer.influence(module, make_loader(N), make_loader(Q), method="identity", damping=1.0)
    expected = gradients(module, make_loader(Q)) @ gradients(module, make_loader(N)).T / N
    torch.testing.assert_close(answer.scores, expected, rtol=1e-9, atol=1e-12)
    assert answer.diagnostics.parameters_covered == 1


@pytest.mark.parametrize("method", ["ekfac", "auto", "exact"])
def test_methods_answer(fitted, method):
    trainer, module = fitted
    assert trainer.influence(module, make_loader(N), make_loader(Q), method=method).scores.shape == (Q, N)


def test_products_and_edits_have_the_parameters_own_names(fitted):
    trainer, module = fitted
    products, _ = InfluenceModule(module).ihvp(make_loader(N), make_loader(Q), method="exact", damping=0.1)
    assert {name: tuple(p.shape[1:]) for name, p in products.items()} == {
        name: tuple(p.shape) for name, p in module.named_parameters()
    }
    edit = trainer.forget([0, 3], module, make_loader(N), step=1.0)
    assert set(edit.changes) <= set(products)
