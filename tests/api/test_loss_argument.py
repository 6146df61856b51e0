"""`loss=` of a call takes the place of a step's own loss that couples examples, and is compared with it."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule, InfluenceTrainer, InfluenceWarning
from lightning_influence.support.errors import InfluenceError, UnsupportedModelError

N, Q = 24, 5


class Root(LightningModule):
    """Trains on the root of the mean squared error, which belongs to no example."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1]).sqrt()


def squares(module, batch):
    return (module.net(batch[0]) - batch[1]).square().mean(1)


def mean_of_squares(module, batch):
    return nn.functional.mse_loss(module.net(batch[0]), batch[1])


def opposite(module, batch):
    return -squares(module, batch)


def make_loader(n):
    generator = torch.Generator().manual_seed(n)
    inputs, targets = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (4, 2))
    return DataLoader(TensorDataset(inputs, targets), 6)


def gradients(module, loader):
    rows = []
    for x, y in zip(*loader.dataset.tensors, strict=True):
        loss = squares(module, (x[None], y[None]))[0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
    return torch.stack(rows)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Root()


@pytest.fixture
def trainer(tmp_path):
    return InfluenceTrainer(default_root_dir=tmp_path, logger=False, enable_checkpointing=False)


@pytest.mark.filterwarnings("ignore:.loss=. is not the loss of")
@pytest.mark.parametrize("loss", [squares, mean_of_squares])
def test_scores_are_of_the_loss_that_was_passed(trainer, module, loss):
    expected = gradients(module, make_loader(Q)) @ gradients(module, make_loader(N)).T / N
    options = {"method": "identity", "damping": 1.0, "loss": loss}
    for answer in (
        trainer.influence(module, make_loader(N), make_loader(Q), **options),
        InfluenceModule(module).scores(make_loader(N), make_loader(Q), **options),
    ):
        torch.testing.assert_close(answer.scores, expected, rtol=1e-9, atol=1e-12)
    own = trainer.self_influence(module, make_loader(N), **options)
    diagonal = gradients(module, make_loader(N)).square().sum(1) / N
    torch.testing.assert_close(own.scores, diagonal, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.loss=. is not the loss of")
def test_another_loss_does_not_use_what_was_kept_for_the_first(trainer, module):
    kept = InfluenceModule(module)
    first = kept.scores(make_loader(N), make_loader(Q), method="ekfac", damping=0.1, loss=squares).scores
    doubled = kept.scores(
        make_loader(N), make_loader(Q), method="ekfac", damping=0.1, loss=lambda m, b: 3 * squares(m, b)
    ).scores
    fresh = (
        InfluenceModule(module)
        .scores(
            make_loader(N), make_loader(Q), method="ekfac", damping=0.1, loss=lambda m, b: 3 * squares(m, b)
        )
        .scores
    )
    torch.testing.assert_close(doubled, fresh, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(first, doubled)


def test_without_it_the_reason_is_given(trainer, module):
    with pytest.raises(UnsupportedModelError, match=r"depends on the others.*`loss=`"):
        trainer.influence(module, make_loader(N), make_loader(Q), method="identity")


def test_minus_the_loss_is_refused_and_another_is_told(trainer, module):
    with pytest.raises(InfluenceError, match=r"opposite|minus"):
        trainer.influence(module, make_loader(N), make_loader(Q), method="identity", loss=opposite)
    with pytest.raises(TypeError, match="Got loss=3; accepted is a callable"):
        trainer.influence(module, make_loader(N), make_loader(Q), loss=3)
    with pytest.warns(InfluenceWarning, match="not the loss of `training_step`"):
        trainer.influence(
            module, make_loader(N), make_loader(Q), method="identity", loss=lambda m, b: m.net(b[0])[:, 0]
        )


@pytest.mark.filterwarnings("ignore:.loss=. is not the loss of")
def test_functions_of_one_name_are_told_apart(module):
    def times(factor):
        return lambda own, batch: factor * squares(own, batch)

    kept = InfluenceModule(module)
    kept.scores(make_loader(N), make_loader(Q), method="identity", loss=times(1))
    with pytest.raises(InfluenceError, match=r"opposite|minus"):
        kept.scores(make_loader(N), make_loader(Q), method="identity", loss=times(-1))
