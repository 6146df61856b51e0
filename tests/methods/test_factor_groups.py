"""Factors beyond the memory budget are fitted by groups of layers, and mapped from their files."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.api import engine
from lightning_influence.methods.forecast import Forecast
from lightning_influence.support.storage import load_tensors, save_tensors

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
SMALL, GROUPS = 2600, 4  # bytes, with which the Linear layers are groups of their own, or nearly so


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        )
        self.double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def load(count: int, seed: int = 0, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(3, (count,), generator=generator)), batch_size)


def ask(folder=None, seed=0, method="ekfac", budget=SMALL, module=None, **options):
    module = module or InfluenceModule(Net(), progress="progress" in options)
    options.pop("progress", None)
    given = {"method": method, "damping": 0.1, "low_rank_tolerance": 0.0, "memory_budget": budget, **options}
    folder = {} if folder is None else {"factors_dir": folder}
    return module.scores(load(24, seed), load(6, 9), **given, **folder)


def list_passes(found) -> list[str]:
    """Names of the passes; those that a folder divides into parts count as one."""
    names = [one["name"].removeprefix("Influence: ") for one in found.diagnostics.passes]
    return [name for name, _ in itertools.groupby(names)]


def list_fits(found) -> list[str]:
    return [name for name in list_passes(found) if name in {"covariances", "eigenvalues"}]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ekfac", "kfac", "auto"])
def test_answers_are_those_of_factors_fitted_together(method, tmp_path):
    module = InfluenceModule(Net())
    expected, found = ask(method=method), ask(tmp_path, method=method, module=module)
    torch.testing.assert_close(found.scores, expected.scores, **CLOSE)
    assert len(list(tmp_path.glob("group-*"))) == len(list(tmp_path.iterdir())) == GROUPS
    assert list_fits(found) == ["covariances", "eigenvalues"] * GROUPS
    assert any(f"in {GROUPS} groups of layers" in note for note in found.diagnostics.warnings)
    again = ask(tmp_path, method=method, module=module)
    assert list_fits(again) == []
    torch.testing.assert_close(again.scores, expected.scores, **CLOSE)


@pytest.mark.slow
def test_files_are_mapped_and_read_by_others(tmp_path):
    module = InfluenceModule(Net())
    first = ask(tmp_path, module=module)
    if sys.platform == "linux":
        assert "group-" in Path("/proc/self/maps").read_text(encoding="utf-8")
    second = ask(tmp_path)
    assert list_fits(second) == []
    assert torch.equal(first.scores, second.scores)
    torch.testing.assert_close(ask(tmp_path, method="kfac").scores, ask(method="kfac").scores, **CLOSE)
    whole = ask(tmp_path, budget=2**30)  # another budget does not divide the layers
    torch.testing.assert_close(whole.scores, first.scores, **CLOSE)


@pytest.mark.slow
def test_groups_of_other_data_are_fitted_again(tmp_path):
    ask(tmp_path, seed=1)
    files = sorted(tmp_path.iterdir())
    for file in files[::2]:
        file.unlink()
    found = ask(tmp_path, seed=2)
    torch.testing.assert_close(found.scores, ask(seed=2).scores, **CLOSE)
    torch.testing.assert_close(ask(tmp_path, seed=1).scores, ask(seed=1).scores, **CLOSE)  # all are of others


def test_passes_of_groups_are_foretold(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_LONG", 1)
    told, add = [], Forecast.add_factors
    monkeypatch.setattr(Forecast, "add_factors", lambda self, count: (told.append(count), add(self, count)))
    found = ask(tmp_path, progress=True)
    assert told == [len(list_fits(found))] == [2 * GROUPS]


def test_mapped_tensors_are_verified_and_leave_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.arange(4.0)}, {})
    mapped = load_tensors(path, mapped=True)[0]["x"]
    mapped += 1  # in memory alone
    assert mapped.tolist() == [1, 2, 3, 4]
    assert load_tensors(path)[0]["x"].tolist() == [0, 1, 2, 3]
