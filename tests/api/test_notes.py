"""What an answer tells of changed gradients and of layers without factors; batches that a step writes to."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer, InfluenceWarning

N, Q = 24, 4


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)

    def loss(self, inputs, labels):
        return nn.functional.cross_entropy(self.head(self.body(inputs)), labels)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


class Tripling(Net):
    """Writes to its batch."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0].mul_(3), batch[1])


def make_data(n):
    return TensorDataset(torch.randn(n, 4, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 3)


def make_loader(n):
    return DataLoader(make_data(n), 6)


def make_trainer(*callbacks, **options):
    off = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return InfluenceTrainer(callbacks=list(callbacks), **off, **options)


def gradients(module, data, scale=1):
    rows = []
    for x, y in zip(*data.tensors, strict=True):
        loss = module.loss(scale * x[None], y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    return torch.stack(rows)


@pytest.mark.parametrize("made", [False, True])
def test_a_step_that_writes_to_its_batch_sees_it_once_a_run(made):
    module, data, queries = Tripling(), make_data(N), make_data(Q)
    expected = gradients(module, queries, 3) @ gradients(module, data, 3).T / N
    train = [data.tensors] if made else DataLoader(data, 6)
    before = data.tensors[0].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        answer = InfluenceModule(module).scores(train, DataLoader(queries, Q), method="identity")
    torch.testing.assert_close(answer.scores, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(data.tensors[0], before)


def test_hooks_on_gradients_are_told():
    module = Net()
    module.head.weight.register_hook(lambda gradient: gradient * (torch.arange(6) < 3))
    with pytest.warns(InfluenceWarning, match=r"Hooks .* of \['head'\] .*before these hooks"):
        answer = InfluenceModule(module).scores(make_loader(N), make_loader(Q), method="identity")
    assert any("head" in note for note in answer.diagnostics.warnings)


class Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.1)


def test_layers_that_were_thawed_in_the_fit_are_fitted_in_a_pass():
    module, trainer = Net(), make_trainer(InfluenceCallback(every_n_steps=1), Thawing(), max_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, make_loader(N))
    answer = trainer.influence(module, make_loader(N), make_loader(Q), method="ekfac")
    assert any("no factors of 'body.0'" in told for told in answer.diagnostics.warnings)
    assert "body.0" in answer.diagnostics.layers
    again = trainer.influence(module, make_loader(N), make_loader(Q), method="ekfac", factors="refit")
    assert "body.0" in again.diagnostics.layers


class WithHook(Net):
    def influence_loss(self, batch):
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1], reduction="none")


def test_an_empirical_fisher_that_was_asked_for_is_no_want_of_another():
    module, trainer = WithHook(), make_trainer(InfluenceCallback(fisher="empirical"), max_epochs=2)
    trainer.fit(module, make_loader(N))
    notes = trainer.influence(module, make_loader(N), make_loader(Q), method="ekfac").diagnostics.warnings
    assert not any("no known loss function" in note for note in notes)


@pytest.mark.parametrize("method", ["auto", "ekfac", "cg"])
def test_examples_without_gradients_have_no_influence(method):
    """A model that is sure of everything: every loss is 0 in float32, and so is every gradient."""
    module = Net()
    labels = torch.arange(N) % 3
    data = TensorDataset(nn.functional.one_hot(labels, 4).float(), labels)
    with torch.no_grad():
        module.body[0].weight.copy_(torch.eye(6, 4) * 9)
        module.body[0].bias.zero_()
        module.head.weight.copy_(torch.eye(3, 6) * 400)
        module.head.bias.zero_()
    assert not gradients(module, data).any()
    scores = InfluenceModule(module).scores(DataLoader(data, 6), DataLoader(data, 6), method=method).scores
    assert scores.shape == (N, N)
    assert not scores.any()


class SquaredForms(LightningModule):
    """Bare parameters, and a loss of which nothing tells whose rows are whose."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def training_step(self, batch, batch_idx=0):
        return (batch @ self.weight * batch).sum(1).square().mean()


@pytest.mark.parametrize(
    "loss", [None, lambda module, batch: (batch @ module.weight * batch).sum(1).square()]
)
def test_the_empirical_fisher_is_named_where_examples_run_alone_or_values_are_given(loss):
    train = [torch.randn(6, 3)]
    found = InfluenceModule(SquaredForms()).scores(train, train, method="ekfac", damping=0.1, loss=loss)
    assert any("no known loss function" in note for note in found.diagnostics.warnings)
