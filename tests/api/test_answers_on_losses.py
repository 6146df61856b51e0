"""Parameters that the loss alone uses, asked about by every method and changed by edits as all others are."""

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer

N, Q = 20, 4


class TwoTasks(lightning.LightningModule):
    """Errors of two outputs, weighed by learned variances (Kendall et al. 2018)."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 2)
        self.log_variance = nn.Parameter(torch.tensor([0.2, -0.1]))
        self.double()

    def terms(self, x, y):
        hidden = torch.tanh(self.body(x))
        return (self.first(hidden)[:, 0] - y[:, 0]).square(), (self.second(hidden) - y).cosh().log().sum(1)

    def training_step(self, batch, batch_idx):
        means = torch.stack([term.mean() for term in self.terms(*batch)])
        return (means * (-self.log_variance).exp() + self.log_variance).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def make_loader(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (3, 2))
    return DataLoader(TensorDataset(x, y), 6)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    module = TwoTasks()
    trainer = InfluenceTrainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[InfluenceCallback()],
    )
    trainer.fit(module, make_loader(N, 0))
    return trainer, module.eval()


def gradients(module, loader):
    parameters = list(module.parameters())
    rows = [
        torch.autograd.grad(module.training_step((x[None], y[None]), 0), parameters)
        for x, y in zip(*loader.dataset.tensors, strict=True)
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def gauss_newton(module, loader):
    """The parameters' order is the model's: the variances come first."""
    x, y = loader.dataset.tensors
    parameters, scale = list(module.parameters()), (-module.log_variance.detach()).exp()
    total = 0
    for n in range(len(x)):
        hidden = torch.tanh(module.body(x[n]))
        outputs = torch.cat([module.first(hidden), module.second(hidden)])
        rows = [
            torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for o in outputs
        ]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        bends = torch.cat([2 * scale[:1], scale[1] / (outputs[1:].detach() - y[n]).cosh().square()])
        total = total + jacobian.T @ (bends[:, None] * jacobian) / len(x)
    means = torch.stack([term.mean() for term in module.terms(x, y)]).detach()
    total[:2, :2] += torch.diag(means * scale)
    return total


@pytest.mark.slow
def test_dense_methods_have_their_blocks(fitted):
    trainer, module = fitted
    train, queries = make_loader(N, 0), make_loader(Q, 1)
    own, asked = gradients(module, train), gradients(module, queries)
    matrix = gauss_newton(module, train) + 0.1 * torch.eye(own.shape[1], dtype=torch.float64)
    expected = asked @ torch.linalg.solve(matrix, own.T) / N
    for method, options in {
        "exact": {},
        "cg": {"tolerance": 1e-12},
        "minres": {"tolerance": 1e-12},
        "auto": {"tolerance": 1e-10, "max_steps": 60},
    }.items():
        found = trainer.influence(module, train, queries, method=method, damping=0.1, log=False, **options)
        torch.testing.assert_close(found.scores.double(), expected, rtol=1e-5, atol=1e-7)
        assert found.diagnostics.parameters_covered == 1
        assert any("The loss uses 'log_variance' beside" in note for note in found.diagnostics.warnings)
    whole = trainer.influence(module, train, queries, method="hessian", damping=0.1, log=False)
    assert not any("beside the outputs" in note for note in whole.diagnostics.warnings)
    plain = trainer.influence(module, train, queries, method="identity", log=False).scores.double()
    torch.testing.assert_close(plain, asked @ own.T / N, rtol=1e-5, atol=1e-8)
    itself = trainer.self_influence(module, train, method="identity").scores.double()
    torch.testing.assert_close(itself, own.square().sum(1) / N, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal", "block_ggn"])
def test_methods_by_layer_have_the_exact_block(fitted, method):
    """Of this parameter alone: its curvature is diagonal, so all of them know it exactly."""
    trainer, module = fitted
    train, queries = make_loader(N, 0), make_loader(Q, 1)
    asked = {"layers": ["log_variance"], "method": method, "damping": 0.1, "factors": "refit", "log": False}
    found = trainer.influence(module, train, queries, **asked).scores.double()
    own, others = gradients(module, train)[:, :2], gradients(module, queries)[:, :2]
    block = gauss_newton(module, train)[:2, :2] + 0.1 * torch.eye(2, dtype=torch.float64)
    expected = others @ torch.linalg.solve(block, own.T) / N
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lissa", "astra"])
def test_stochastic_methods_answer(fitted, method):
    trainer, module = fitted
    train, queries = make_loader(N, 0), make_loader(Q, 1)
    own, asked = gradients(module, train), gradients(module, queries)
    matrix = gauss_newton(module, train) + torch.eye(own.shape[1], dtype=torch.float64)
    expected = asked @ torch.linalg.solve(matrix, own.T) / N
    found = trainer.influence(module, train, queries, method=method, damping=1.0, log=False).scores.double()
    assert (found - expected).norm() < 0.2 * expected.norm()


def test_edits_change_them_as_all_others(fitted):
    _, module = fitted
    edit = InfluenceModule(module).forget([0, 3], make_loader(N, 0), ratio=1.0, step="theory")
    changed = {name for name, change in edit.changes.items() if bool((change.after != change.before).any())}
    assert "log_variance" in changed
    assert changed == {name for name, _ in module.named_parameters()}


def test_a_fit_is_not_changed():
    torch.manual_seed(0)
    plain = TwoTasks()
    watched = TwoTasks()
    watched.load_state_dict(plain.state_dict())
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(**options).fit(plain, make_loader(N, 0))
    lightning.Trainer(**options, callbacks=[InfluenceCallback()]).fit(watched, make_loader(N, 0))
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


class Scaled(torch.autograd.Function):
    """A product that no operation of torch shows."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x.detach() * scale.detach()

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum(0)


class Unseen(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor([0.5, 2.0]))
        self.double()

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(Scaled.apply(self.layer(batch[0]), self.scale), batch[1])


def test_what_one_question_has_found_slow_is_slow_in_the_next():
    torch.manual_seed(0)
    module, train = Unseen(), make_loader(N, 0)
    trainer = InfluenceTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    own = gradients(module.eval(), train)
    for _ in range(2):
        found = trainer.influence(module, train, train, method="identity", log=False).scores.double()
        torch.testing.assert_close(found, own @ own.T / N, rtol=1e-5, atol=1e-8)
