"""Stored runs of the harness belong to the values that its functions use; seeds and masks it refuses."""

import logging
from dataclasses import dataclass, replace

import harness_models as models
import numpy as np
import pytest
import torch

from lightning_influence.evaluation.harness import Retraining, retrain_subsets

RIDGE = Retraining(models.ridge, models.trainer, models.data, models.loader, models.queries)
MASKS = torch.ones(1, 8, dtype=torch.bool).scatter(1, torch.tensor([[3]]), value=False)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def run(module=models.ridge, masks=MASKS, seeds=(0,), **options):
    return retrain_subsets(
        replace(RIDGE, module=module), masks, seeds, processes=0, progress=False, **options
    )


class Plain:
    rate = 0.01


@dataclass
class Settings:
    rate: float = 0.01


@dataclass
class Holder:
    parts: dict


PLAIN, SETTINGS, HOLDER = Plain(), Settings(), Holder({"optimizer": Plain()})


class Slow(models.Ridge):
    rate = 0.01

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class OfPlain(models.Ridge):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=PLAIN.rate)


class OfSettings(models.Ridge):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=SETTINGS.rate)


class OfHolder(models.Ridge):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=HOLDER.parts["optimizer"].rate)


class OfTensor(models.Ridge):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=float(FACTORY.tensor))


class Factory:
    def __init__(self, rate):
        self.rate, self.tensor = rate, torch.tensor(rate)

    def __call__(self):
        module = Slow()
        module.rate = self.rate
        return module

    def module(self):
        return self()


FACTORY = Factory(0.01)


@pytest.mark.parametrize(
    ("module", "holder"),
    [
        (OfPlain, PLAIN),
        (OfSettings, SETTINGS),
        (OfHolder, HOLDER.parts["optimizer"]),
        (Slow, Slow),
        (FACTORY, FACTORY),
        (FACTORY.module, FACTORY),
    ],
)
def test_a_changed_attribute_is_a_new_computation(tmp_path, monkeypatch, module, holder):
    first = run(module, cache_dir=tmp_path)
    assert torch.equal(run(module, cache_dir=tmp_path), first)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    monkeypatch.setattr(holder, "rate", 0.5)
    changed = run(module, cache_dir=tmp_path)
    assert torch.equal(changed, run(module))
    assert not torch.equal(changed, first)


def test_tensors_of_objects_count_by_value(tmp_path):
    first = run(OfTensor, cache_dir=tmp_path)
    FACTORY.tensor.fill_(0.5)
    assert not torch.equal(run(OfTensor, cache_dir=tmp_path), first)
    FACTORY.tensor.fill_(0.01)
    assert torch.equal(run(OfTensor, cache_dir=tmp_path), first)


def test_what_cannot_be_described_is_refused_where_runs_are_kept(tmp_path):
    rates = iter(rate for rate in [0.1] * 9)

    def make():
        module = Slow()
        module.rate = next(rates)
        return module

    run(make)
    with pytest.raises(TypeError, match=r"`rates` is a builtins\.generator.* give no `cache_dir`"):
        run(make, cache_dir=tmp_path)


@pytest.mark.parametrize("seeds", [torch.tensor([0, 1]), np.array([0, 1]), range(2)])
def test_seeds_are_any_sequence_of_integers(tmp_path, seeds):
    expected = run(seeds=[0, 1], cache_dir=tmp_path)
    assert torch.equal(run(seeds=seeds, cache_dir=tmp_path), expected)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 3}, "different integers, got 3"),
        ({"seeds": [0.5]}, r"different integers, got \[0\.5\]"),
        ({"seeds": torch.tensor([1, 1])}, r"different integers, got tensor\(\[1, 1\]\)"),
        ({"masks": MASKS[:0]}, r"M at least 1 .* of shape \(0, 8\)"),
        ({"masks": MASKS.tolist()}, "got a list"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
