"""What running a training step changes is undone: weights, buffers, metrics and plain attributes."""

import copy

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule, InfluenceTrainer
from lightning_influence.running.host.states import ModuleStates


class Average:
    """A helper object with tensors of its own, as moving averages of weights come."""

    def __init__(self, parameters):
        self.shadow = [p.detach().clone() for p in parameters]


class Busy(LightningModule):
    """A training step that leaves traces everywhere."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.average = Average(self.net.parameters())
        self.register_buffer("seen", torch.zeros(()))
        self.steps, self.losses, self.by_kind = 0, [], {"all": []}
        self.running = torch.zeros(3)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.seen += 1
        self.made_up = self.steps
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
            self.average.shadow[0] += 1
            self.running += 1
            self.net[0].weight.data.clamp_(-0.2, 0.2)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss)
        self.by_kind["all"].append(float(loss))
        return loss


def make_loader(n=24):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(n, 4, generator=generator), torch.arange(n) % 3), 6)


def read(module):
    tensors = {name: t.clone() for name, t in module.state_dict().items()}
    tensors |= {"running": module.running.clone(), "shadow": module.average.shadow[0].clone()}
    return tensors, (module.steps, len(module.losses), len(module.by_kind["all"]), hasattr(module, "made_up"))


def assert_same(before, after):
    assert before[1] == after[1]
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name


@pytest.mark.parametrize("through", ["trainer", "module"])
def test_asking_leaves_the_module_as_it_was(tmp_path, through):
    module = Busy()
    before = read(module)
    if through == "trainer":
        trainer = InfluenceTrainer(default_root_dir=tmp_path, logger=False, enable_checkpointing=False)
        trainer.influence(module, make_loader(), make_loader(6), method="ekfac")
    else:
        InfluenceModule(module).scores(make_loader(), make_loader(6), method="ekfac")
    assert_same(before, read(module))


def test_every_batch_sees_the_weights_of_the_first(tmp_path):
    """Clipping in the step would else give the second batch other weights than the first had."""
    clipped = Busy()
    scores = InfluenceModule(clipped).scores(make_loader(), make_loader(6), method="identity").scores
    with torch.no_grad():
        clipped.net[0].weight.clamp_(-0.2, 0.2)
    already = InfluenceModule(clipped).scores(make_loader(), make_loader(6), method="identity").scores
    torch.testing.assert_close(scores, already, rtol=1e-5, atol=1e-7)


def test_objects_keep_their_identity():
    module = Busy()
    losses, shadow, weight = module.losses, module.average.shadow, module.net[0].weight
    states = ModuleStates(module)
    assert not states.have_weights_changed()
    module.training_step((torch.randn(6, 4), torch.arange(6) % 3), 0)
    module.losses = ["another list"]
    assert states.have_weights_changed()
    states.restore()
    assert module.losses is losses
    assert losses == []
    assert module.average.shadow is shadow
    assert module.net[0].weight is weight
    assert not states.have_weights_changed()


def test_data_that_hang_on_a_module_are_not_copied():
    module = Busy()
    module.data = LightningDataModule()
    module.data.rows = torch.zeros(3)
    module.dataset = TensorDataset(torch.zeros(3))
    states = ModuleStates(module)
    module.data.rows += 1
    module.dataset.tensors[0].add_(1)
    states.restore()
    assert module.data.rows.sum() == module.dataset.tensors[0].sum() == 3
