"""Fits of factors that are killed go on where they were, and give what an undisturbed one gives."""

import multiprocessing
import os
import signal

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.curvature import eigenbases
from lightning_influence.methods import resuming
from lightning_influence.support.errors import CorruptFileError

pytestmark = pytest.mark.faults
# Processes of a server of its own: a fork of this one would have no threads for gradients.
SERVED = multiprocessing.get_context("forkserver")
SERVED.set_forkserver_preload(["lightning_influence", "lightning.pytorch"])
N, BATCH = 40, 4
RUN = {"steps": 0, "last": None}  # of the process; the module's own attributes are put back after a pass
OPTIONS = {"method": "ekfac", "damping": 0.1, "low_rank_tolerance": 0.0}


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx=0):
        RUN["steps"] += 1
        if RUN["steps"] == RUN["last"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return functional.cross_entropy(self.net(batch[0]), batch[1])


def data(count=N, seed=1, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64) + shift
    y = torch.randint(3, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), BATCH)


def ask(folder=None, last=None, train=None, budget=2**30):
    RUN.update(steps=0, last=last)
    options = {**OPTIONS, "memory_budget": budget}
    options = options if folder is None else {**options, "factors_dir": folder}
    found = InfluenceModule(Net().double()).scores(train or data(), data(6, 2), **options)
    return RUN["steps"], found


def die_at_the_second_basis(folder):
    done = []

    def compute(name, layer, dtype=torch.float64):
        if done:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(name)
        return eigenbases.compute_eigenbasis(name, layer, dtype)

    resuming.compute_eigenbasis = compute
    ask(folder)


def kill(target, *args):
    process = SERVED.Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed():
    return ask()[1].scores


def test_a_killed_fit_goes_on_from_the_part_it_was_in(tmp_path, undisturbed):
    in_all, found = ask(tmp_path / "whole")
    torch.testing.assert_close(found.scores, undisturbed, rtol=1e-9, atol=1e-12)
    folder, finished = tmp_path / "killed", []
    for last in (12, 9, 9, 9, 9):
        kill(ask, folder, last)
        finished.append(sorted(path.name.split("-")[0] for path in folder.iterdir()))
    assert finished[0] == ["covariances"]  # those of the parts before are gone
    assert finished[-1] == ["bases"] * 4 + ["covariances", "squares"]
    steps, found = ask(folder)
    assert steps < in_all - 2 * N / BATCH + 4
    torch.testing.assert_close(found.scores, undisturbed, rtol=1e-9, atol=1e-12)
    assert any("read from factors_dir" in note for note in found.diagnostics.warnings)
    assert len([path for path in folder.iterdir() if path.name.startswith("covariances")]) == 1


def test_groups_of_layers_that_are_finished_are_not_fitted_again(tmp_path, undisturbed):
    """Three groups, each of two passes over ten batches; the first pass of the second one is killed."""
    in_all, found = ask(tmp_path / "whole", budget=3000)
    torch.testing.assert_close(found.scores, undisturbed, rtol=1e-9, atol=1e-12)
    assert len(list((tmp_path / "whole").glob("group-*"))) == 3
    kill(ask, tmp_path / "killed", 26, None, 3000)
    finished = sorted(path.name.split("-")[0] for path in (tmp_path / "killed").iterdir())
    assert finished == ["covariances", "group"]
    steps, found = ask(tmp_path / "killed", budget=3000)
    assert steps < in_all - 2 * N / BATCH
    torch.testing.assert_close(found.scores, undisturbed, rtol=1e-9, atol=1e-12)


def test_a_killed_fit_with_batches_of_another_size_begins_its_passes_anew(tmp_path):
    kill(ask, tmp_path, 7)  # of ten parts of 4
    fit = {"method": "ekfac", "damping": 0.1}
    wide = DataLoader(data().dataset, 2 * BATCH)  # of which there would be five parts of 8
    RUN.update(steps=0, last=None)
    expected = InfluenceModule(Net().double()).ihvp(wide, data(6, 2), **fit)[0]
    found = InfluenceModule(Net().double()).ihvp(wide, data(6, 2), factors_dir=tmp_path, **fit)[0]
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-9, atol=1e-12)


def test_a_finished_layer_is_not_decomposed_again(tmp_path, undisturbed, monkeypatch):
    kill(die_at_the_second_basis, tmp_path)
    assert len(list(tmp_path.glob("bases-*"))) == 1
    computed = []

    def count(name, layer, dtype=torch.float64):
        computed.append(name)
        return eigenbases.compute_eigenbasis(name, layer, dtype)

    monkeypatch.setattr(resuming, "compute_eigenbasis", count)
    found = ask(tmp_path)[1]
    assert len(computed) == 3  # of two layers and two parameters
    torch.testing.assert_close(found.scores, undisturbed, rtol=1e-9, atol=1e-12)


def test_later_calls_read_what_is_finished_and_other_data_are_noticed(tmp_path, undisturbed):
    first, _ = ask(tmp_path)
    steps, found = ask(tmp_path)
    assert steps == first - 2 * N / BATCH
    torch.testing.assert_close(found.scores, undisturbed, rtol=1e-9, atol=1e-12)
    other = data(shift=0.5)
    expected = ask(train=other)[1].scores
    found = ask(tmp_path, train=other)[1]
    torch.testing.assert_close(found.scores, expected, rtol=1e-9, atol=1e-12)
    again = ask(tmp_path, train=other)[1]
    torch.testing.assert_close(again.scores, expected, rtol=1e-9, atol=1e-12)


def test_other_weights_are_fitted_anew_and_damage_is_named(tmp_path):
    ask(tmp_path)
    model = Net().double()
    with torch.no_grad():
        model.net[0].weight.mul_(1.1)
    expected = InfluenceModule(model).scores(data(), data(6, 2), **OPTIONS).scores
    found = InfluenceModule(model).scores(data(), data(6, 2), factors_dir=tmp_path, **OPTIONS).scores
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    file = next(tmp_path.glob("bases-*"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CorruptFileError, match=file.name):
        InfluenceModule(model).scores(data(), data(6, 2), factors_dir=tmp_path, **OPTIONS)
    with pytest.raises(TypeError, match="factors_dir=3; accepted is the path of a folder"):
        ask(3)
