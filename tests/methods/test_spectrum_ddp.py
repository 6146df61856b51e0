"""The spectrum on two processes: of all examples, whoever visits them."""

from __future__ import annotations

import pytest
from two_processes import check_script

SCRIPT = """
import sys, warnings
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence import InfluenceModule, InfluenceTrainer
from lightning_influence.methods.spectrum import SpectrumSettings
from lightning_influence.api.engine import Question
from lightning_influence.api.session import Session

torch.set_num_threads(1)
warnings.simplefilter("ignore")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def eigenvalues(module, x, y, curvature):
    shapes = {name: p.detach() for name, p in module.body.named_parameters()}
    flat = torch.cat([p.flatten() for p in shapes.values()])

    def outputs(theta):
        parts = theta.split([p.numel() for p in shapes.values()])
        named = {k: part.view(p.shape) for (k, p), part in zip(shapes.items(), parts)}
        return torch.func.functional_call(module.body, named, x)

    if curvature == "hessian":
        H = torch.func.hessian(lambda theta: nn.functional.cross_entropy(outputs(theta), y))(flat)
        return torch.linalg.eigvalsh(H).flip(0)
    J, p = torch.func.jacrev(outputs)(flat), outputs(flat).softmax(1)
    bend = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.linalg.eigvalsh(torch.einsum("ncp,ncd,ndq->pq", J, bend, J) / len(x)).flip(0)


torch.manual_seed(0)
x, y = torch.randn(13, 4, dtype=torch.float64), torch.arange(13) % 3
module = Net().double()
trainer = InfluenceTrainer(
    max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
)
loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
trainer.fit(module, loader)
assert trainer.world_size == 2
for curvature in ("ggn", "hessian"):
    truth = eigenvalues(module, x, y, curvature)
    settings = {"probes": 8, "steps": 20, "minibatches": 6}
    found = []
    # A module of its own visits everything on each process, also where Lightning has split the loader.
    for train in (loader, trainer.train_dataloader):
        found.append(InfluenceModule(module).spectrum(train, curvature, **settings))
    with Session(trainer, module, None, None, None) as session:  # the processes share the examples
        engine = session.ask(Question())
        found.append(engine.spectrum(loader, SpectrumSettings(curvature, **settings)))
    for spectrum in found:
        assert spectrum.numel == len(truth)
        assert abs(spectrum.trace.value - float(truth.sum())) < 1e-9
        assert abs(spectrum.square_trace.value - float(truth.square().sum())) < 1e-9
        for own, value in zip(spectrum.eigenvalues, truth.tolist()):
            assert abs(own.value - value) < 1e-9
        assert abs(spectrum.smallest.value - float(truth[-1])) < 1e-9
        assert abs(spectrum.example_variance.value - found[0].example_variance.value) < 1e-8
"""


@pytest.mark.slow
def test_two_processes_find_the_spectrum_of_all_examples(tmp_path):
    check_script(SCRIPT, tmp_path)
