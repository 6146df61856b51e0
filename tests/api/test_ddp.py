"""Two processes answer as one does."""
# ruff: noqa: E501

from __future__ import annotations

import pytest
from two_processes import check_script

SCRIPT = """
import sys, warnings
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer

torch.set_num_threads(1)
warnings.simplefilter("ignore")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.rare = nn.Linear(4, 3)  # takes part where an example asks for it
        self.idle = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        outputs = self.body(batch[0])
        if bool((batch[0][:, 0] > 2).any()):
            outputs = outputs + (batch[0][:, :1] > 2) * self.rare(batch[0])
        weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        return nn.functional.cross_entropy(outputs, batch[1], weight=weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


torch.manual_seed(0)
x = torch.randn(13, 4, dtype=torch.float64).clamp(-1.9, 1.9)
x[4, 0] = 3.0
data = TensorDataset(x, torch.arange(13) % 3)
queries = TensorDataset(torch.randn(3, 4, dtype=torch.float64), torch.arange(3))
one_query = torch.utils.data.Subset(queries, [1])
module = Net().double()
trainer = InfluenceTrainer(
    max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1],
)
train = DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
alone = InfluenceModule(module)
exact = {"fisher": "exact", "low_rank_tolerance": 0.0}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


for method in ("identity", "diagonal", "kfac", "ekfac", "exact", "hessian", "block_ggn", "auto"):
    for asked in ([DataLoader(one_query), DataLoader(queries)], DataLoader(one_query))[: 1 + (method == "auto")]:
        options = {"method": method, "damping": 0.1, "max_steps": 0, **exact}
        if method in ("kfac", "ekfac", "auto"):
            # The average input of a layer that only some batches use depends on the batches: finite is all to ask.
            assert trainer.influence(module, train, asked, log=False, **options).scores.isfinite().all()
            options["layers"] = ["body.*", "idle"]
        alone = InfluenceModule(module)
        ours = trainer.influence(module, train, asked, log=False, **options)
        theirs = alone.scores(DataLoader(data, batch_size=13), asked, **options)
        close(ours.scores, theirs.scores)
        assert ours.query_indices.tolist() == theirs.query_indices.tolist()
        assert ours.train_indices.tolist() == list(range(13))
        assert any("idle" in note for note in ours.diagnostics.warnings), ours.diagnostics.warnings
        assert ("rare" in ours.diagnostics.layers) == ("layers" not in options)
        assert "idle" not in ours.diagnostics.layers
        few = trainer.influence(module, train, asked, log=False, top_k=2, **options)
        close(few.top_scores, theirs.top(2).scores)
        assert few.top_indices.tolist() == theirs.top(2).indices.tolist()
    options.pop("max_steps"), options.pop("low_rank_tolerance")
    ours, theirs = trainer.self_influence(module, train, log=False, **options), alone.self_influence(train, **options)
    close(ours.scores, theirs.scores)

converged = {"layers": ["body.*"], "damping": 0.1, "tolerance": 1e-10, "max_steps": 30, **exact}
close(
    trainer.influence(module, train, DataLoader(queries), log=False, **converged).scores,
    alone.scores(train, DataLoader(queries), **converged).scores,
)
for method, further in (
    ("cg", {}),
    ("cg", {"memory_budget": 2000}),
    ("minres", {"curvature": "hessian"}),
    ("astra", {}),
    ("lissa", {}),
    ("lissa", {"batch_size": 4}),
):
    options = {"layers": ["body.*"], "method": method, "damping": 0.5, "tolerance": 1e-9, **exact, **further}
    options["max_steps"] = 5000
    ours = trainer.influence(module, train, DataLoader(queries), log=False, **options)
    theirs = alone.scores(DataLoader(data, batch_size=13), DataLoader(queries), **options)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-9)
    assert ours.diagnostics.residuals.max() <= 1e-9
first = torch.utils.data.Subset(data, [4])  # one example for two processes
for method in ("ekfac", "diagonal", "exact", "hessian", "block_ggn", "auto", "identity"):
    options = {"method": method, "damping": 0.1, "max_steps": 0, **exact}
    for k in (None, 1)[method == "ekfac" :]:
        ours = trainer.influence(module, DataLoader(first), DataLoader(queries), log=False, top_k=k, **options)
        theirs = InfluenceModule(module).scores(DataLoader(first), DataLoader(queries), top_k=k, **options)
        close(ours.top(1).scores, theirs.top(1).scores)

callback = InfluenceCallback(every_n_steps=1, log_statistics=False)
fitted = InfluenceTrainer(
    max_epochs=8, accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
)
fitted.fit(module, train)
ours = fitted.influence(module, train, DataLoader(queries), method="ekfac", log=False)
fitted.save_checkpoint(sys.argv[1] + "/a.ckpt")
fitted.strategy.barrier()
theirs = InfluenceModule.from_checkpoint(sys.argv[1] + "/a.ckpt", module).scores(
    train, DataLoader(queries), method="ekfac"
)
close(ours.scores, theirs.scores)

# Both processes find that the coarse space is of other data, and make it again.
options = {"damping": 0.1, "max_steps": 0, "low_rank_tolerance": 0.0, "layers": ["body.*"]}
other = DataLoader(TensorDataset(1.5 * x.flip(1), data.tensors[1]), batch_size=4)
fitted.influence(module, train, DataLoader(queries), log=False, **options)
ours = fitted.influence(module, other, DataLoader(queries), log=False, **options)
assert any("other training data" in note for note in ours.diagnostics.warnings), ours.diagnostics.warnings
theirs = InfluenceModule.from_checkpoint(sys.argv[1] + "/a.ckpt", module).scores(other, DataLoader(queries), **options)
close(ours.scores, theirs.scores)

from lightning_influence.support.errors import UnsupportedTrainerError
before = module.body[0].weight.clone()
for ask in (lambda t: t.forget([0], module, train), lambda t: t.relabel([0], 1, module, train)):
    try:
        ask(fitted)
    except UnsupportedTrainerError as error:
        assert "has 2 processes; edits run on one. Pass a Trainer with devices=1" in str(error)
    else:
        raise AssertionError("an edit on two processes was not refused")
assert torch.equal(before, module.body[0].weight)
"""


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path):
    check_script(SCRIPT, tmp_path)


PARAMETERS = """
import pathlib, sys, warnings
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer

torch.set_num_threads(1)
warnings.simplefilter("ignore")


class Reader(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def training_step(self, batch, batch_idx):
        states, _ = self.rnn(self.norm(self.embed(batch[0])))
        return nn.functional.cross_entropy(self.head(states[:, -1]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


torch.manual_seed(0)
module, words, labels = Reader().double(), torch.randint(9, (13, 6)), torch.arange(13) % 3
data = TensorDataset(words, labels)
asked = DataLoader(TensorDataset(words[:3], labels[:3]), 2)
trainer = InfluenceTrainer(
    max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[InfluenceCallback(every_n_steps=1)],
    default_root_dir=sys.argv[1],
)
trainer.fit(module, DataLoader(data, 3))
# Factors of the head are those of the fit; those of the other parameters come from a pass on both processes.
completed = trainer.influence(module, DataLoader(data, 4), asked, method="ekfac", log=False)
assert completed.diagnostics.parameters_covered == 1.0
assert any("no factors of 'embed.weight'" in note for note in completed.diagnostics.warnings)
everyone = [torch.zeros_like(completed.scores) for _ in range(2)]
torch.distributed.all_gather(everyone, completed.scores)
assert torch.equal(everyone[0], everyone[1])
for method in ("identity", "ekfac", "exact", "auto"):
    options = {"method": method, "damping": 0.1, "fisher": "exact", "tolerance": 1e-11, "max_steps": 60}
    options |= {"low_rank_tolerance": 0.0}
    ours = trainer.influence(module, DataLoader(data, 4), asked, factors="refit", log=False, **options)
    theirs = InfluenceModule(module).scores(DataLoader(data, 13), asked, **options)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-6, atol=1e-10)
    assert ours.diagnostics.parameters_covered == 1.0
# What is finished is kept by each process, and read by both.
options |= {"method": "ekfac"}
theirs = InfluenceModule(module).scores(DataLoader(data, 13), asked, **options)
for name, budget in (("factors", 2**30), ("groups", 4000)):
    options |= {"factors_dir": sys.argv[1] + "/" + name, "memory_budget": budget}
    fits = []
    for _ in range(2):
        ours = trainer.influence(module, DataLoader(data, 4), asked, factors="refit", log=False, **options)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-6, atol=1e-10)
        fits.append(sum("covariances" in done["name"] for done in ours.diagnostics.passes))
    assert fits[1] == 0 < fits[0], fits
trainer.strategy.barrier()
files = [path.name for path in pathlib.Path(sys.argv[1], "groups").iterdir()]
assert all(name.startswith("group-") for name in files)
assert len(files) == 2 * sum(name.endswith("-0.factors") for name in files) > 2, files
"""


TABLES = """
from lightning_influence.model.layers import layer as layers

layers.DENSE_WIDTH, layers.MATRIX_WIDTH = 10, 7
"""


@pytest.mark.slow
@pytest.mark.parametrize("limits", ["", TABLES], ids=["vectors", "tables"])
def test_two_processes_cover_parameters_outside_of_layers(tmp_path, limits):
    check_script(limits + PARAMETERS, tmp_path)


UNSEEN = """
import sys, warnings
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_influence import InfluenceCallback, InfluenceModule, InfluenceTrainer
from lightning_influence.curvature import eigenbases, factors as sums

torch.set_num_threads(1)
warnings.simplefilter("ignore")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch, batch_idx):
        weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], weight=weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


torch.manual_seed(0)
x = torch.randn(13, 7, dtype=torch.float64)
x[:, 1:4] = 0
module, data = Net().double(), TensorDataset(x, torch.arange(13) % 3)
asked = DataLoader(TensorDataset(torch.randn(3, 7, dtype=torch.float64), torch.arange(3)), 2)
whole = (eigenbases.LARGE, sums._BLOCKED)
eigenbases.LARGE = sums._BLOCKED = 3
trainer = InfluenceTrainer(
    max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[InfluenceCallback(every_n_steps=1)],
    default_root_dir=sys.argv[1],
)
trainer.fit(module, DataLoader(data, 3))
kept = trainer.influence(module, DataLoader(data, 4), asked, method="ekfac", damping=0.1, log=False)
everyone = [torch.zeros_like(kept.scores) for _ in range(2)]
torch.distributed.all_gather(everyone, kept.scores)
assert torch.equal(everyone[0], everyone[1])
for folder in ({}, {"factors_dir": sys.argv[1] + "/factors"}, {"factors_dir": sys.argv[1] + "/factors"}):
    options = {"method": "ekfac", "damping": 0.1, "fisher": "exact", "low_rank_tolerance": 0.0}
    eigenbases.LARGE = sums._BLOCKED = 3
    ours = trainer.influence(module, DataLoader(data, 4), asked, factors="refit", log=False, **options, **folder)
    eigenbases.LARGE, sums._BLOCKED = whole
    theirs = InfluenceModule(module).scores(DataLoader(data, 13), asked, **options)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-7, atol=1e-10)
"""


@pytest.mark.slow
def test_two_processes_leave_the_same_columns_out(tmp_path):
    check_script(UNSEEN, tmp_path)
