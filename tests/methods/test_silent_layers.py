"""Layers that take no part in the loss leave every method's answer alone, and are named."""

from __future__ import annotations

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer
from lightning_influence.support.errors import InfluenceWarning, UnsupportedModelError

METHODS = ["identity", "diagonal", "kfac", "ekfac", "block_ggn", "exact", "hessian", "auto"]


class Net(lightning.LightningModule):
    """`spare` and `scale` are never used."""

    def __init__(self, idle: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        if idle:
            self.spare = nn.Linear(5, 2)
            self.scale = nn.Parameter(torch.ones(4, 5))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).mean(dim=1))

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def pair() -> tuple[Net, Net]:
    with_idle, without = Net().double(), Net(idle=False).double()
    without.load_state_dict(with_idle.state_dict(), strict=False)
    return with_idle, without


def data() -> list:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 2, 3, generator=generator, dtype=torch.float64)
    return [(x[:5], torch.arange(5) % 3), (x[5:], torch.arange(4) % 3)]


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_the_model_without_them(method):
    idle, without = pair()
    options = {"method": method, "damping": 0.1, "fisher": "exact", "low_rank_tolerance": 0.0}
    module = InfluenceModule(idle)
    with pytest.warns(
        InfluenceWarning, match=r"Layers .*'spare'.* took no part in the training loss"
    ) as caught:
        found = module.scores(data(), data(), **options)
    expected = InfluenceModule(without).scores(data(), data(), **options)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-9, atol=1e-12)
    assert found.diagnostics.layers == {"first": 16, "last": 15}
    [note] = [n for n in found.diagnostics.warnings if "took no part" in n]
    assert "scale" in note
    total = sum(p.numel() for p in idle.parameters())
    share = f"{32 / total:.1%} of the trainable parameters"  # 12 of spare, 20 of scale
    assert f"({share} and 0.0% of the squared gradient of a training batch)" in note
    assert found.diagnostics.parameters_covered == pytest.approx(31 / total)
    said = [str(w.message) for w in caught]
    assert sorted(said) == sorted(found.diagnostics.warnings)  # each once
    with pytest.warns(InfluenceWarning, match="took no part|have no factors"):
        again = module.scores(data(), data(), **options)
    torch.testing.assert_close(again.scores, expected.scores, rtol=1e-9, atol=1e-12)
    few = {k: v for k, v in options.items() if k != "low_rank_tolerance"}
    with pytest.warns(InfluenceWarning):
        mine = module.self_influence(data(), **few)
    theirs = InfluenceModule(without).self_influence(data(), **few)
    torch.testing.assert_close(mine.scores, theirs.scores, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_after_a_fit(method, tmp_path):
    trainer = InfluenceTrainer(
        max_epochs=3, accelerator="cpu", callbacks=[InfluenceCallback(every_n_steps=1)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    module = pair()[0]
    dataset = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*data(), strict=True)))
    loader = torch.utils.data.DataLoader(dataset, 3)
    trainer.fit(module, loader)
    with pytest.warns(InfluenceWarning, match=r"Layers .*'spare'.* (took no part|have no factors)"):
        found = trainer.influence(module, loader, loader, method=method)
    assert found.scores.isfinite().all()
    assert list(found.diagnostics.layers) == ["first", "last"]
    # A pass has found that neither takes part: the next question does not run it again.
    with pytest.warns(InfluenceWarning, match="took no part|have no factors"):
        again = trainer.influence(module, loader, loader, method=method)
    ran = [one["name"] for one in again.diagnostics.passes]
    assert method not in {"kfac", "ekfac", "auto"} or not any("covariances" in name for name in ran), ran


@pytest.mark.parametrize("method", METHODS)
def test_queries_that_use_other_layers_than_training(method):
    module = InfluenceModule(pair()[0])

    def other(owner, batch):  # of layers that training never sees, and of the first
        known, unknown = owner.first(batch[0]), torch.ones(len(batch[0]), 5).double()
        return known.sum(dim=(1, 2)) + owner.spare(unknown).sum(1)

    with pytest.warns(InfluenceWarning, match="took no part"):
        found = module.scores(data(), data(), method=method, measurement=other, damping=0.1)
    assert found.scores.isfinite().all()
    assert found.scores.abs().max() > 0


def test_the_share_of_the_squared_gradient_is_told():
    """Of a parameter whose gradients for single examples cannot be had: the step refuses a batch of one."""

    class Scaled(Net):
        def __init__(self):
            super().__init__(idle=False)
            self.scale = nn.Parameter(torch.tensor(0.7))

        def training_step(self, batch, batch_idx):
            assert len(batch[0]) > 1, "a batch of one"
            errors = (self(batch[0]) - functional.one_hot(batch[1], 3)).square().sum(1)
            # By an operation that does not tell what each example adds to the mean.
            mean = torch.dot(errors, torch.full_like(errors, 1 / len(errors)))
            return self.scale.exp() * mean - self.scale

    module = Scaled().double()
    grads = torch.autograd.grad(module.training_step(data()[0], 0), list(module.parameters()))
    squares = {
        name: float(g.square().sum()) for (name, _), g in zip(module.named_parameters(), grads, strict=True)
    }
    expected = squares["scale"] / sum(squares.values())
    assert 0.01 < expected < 0.99
    with pytest.warns(InfluenceWarning, match="'scale'"):
        found = InfluenceModule(module).scores(data(), data(), method="identity")
    assert "scale" not in found.diagnostics.layers
    assert found.diagnostics.extra["squared_gradient_left_out"] == pytest.approx(expected)
    text = f"and {expected:.1%} of the squared gradient of a training batch)"
    assert any("'scale'" in note and text in note for note in found.diagnostics.warnings)


def test_nothing_is_left():
    module = InfluenceModule(pair()[0])
    with pytest.raises(UnsupportedModelError, match="No covered layer took part in the forward pass"):
        module.scores(data(), data(), layers=["spare"])


@pytest.mark.parametrize("size", [1, 4])
def test_a_parameter_beside_the_outputs_is_covered(size):
    """A learned scale of the whole loss."""

    class Scaled(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.log_scale = nn.Linear(3, 1), nn.Parameter(torch.tensor(0.3))

        def training_step(self, batch, batch_idx):
            return functional.mse_loss(self.layer(batch[0]), batch[1]) / self.log_scale.exp() + self.log_scale

    module = Scaled().double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    batches = [(x[at : at + size], y[at : at + size]) for at in range(0, 8, size)]
    asked = InfluenceModule(module)
    with torch.no_grad():
        inputs, scale = torch.cat([x, torch.ones(8, 1, dtype=torch.float64)], 1), module.log_scale.exp()
        errors = module.layer(x) - y
        rows = torch.cat([2 * errors * inputs / scale, 1 - errors.square() / scale], 1)
        matrix = torch.zeros(5, 5, dtype=torch.float64)
        matrix[:4, :4], matrix[4, 4] = 2 * inputs.T @ inputs / 8 / scale, errors.square().mean() / scale
    found = asked.scores(batches, batches, method="identity")
    assert set(found.diagnostics.layers) == {"layer", "log_scale"}
    assert found.diagnostics.parameters_covered == 1
    torch.testing.assert_close(found.scores, rows @ rows.T / 8)
    matrix += 0.1 * torch.eye(5, dtype=torch.float64)
    expected = rows @ torch.linalg.solve(matrix, rows.T) / 8
    for method in ("exact", "ekfac", "block_ggn", "cg"):
        options = {"tolerance": 1e-12} if method == "cg" else {}
        scores = asked.scores(batches, batches, method=method, damping=0.1, **options).scores
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-8)
