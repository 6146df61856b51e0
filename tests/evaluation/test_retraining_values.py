"""Stored values of `retrain` belong to the values that its functions are bound to; what it refuses."""

import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_influence.evaluation.lds import random_subsets
from lightning_influence.evaluation.losses import cross_entropy
from lightning_influence.evaluation.recipe import Recipe
from lightning_influence.evaluation.retraining import fingerprint, retrain
from lightning_influence.evaluation.stacked import Member, train_members
from lightning_influence.support.errors import UnsupportedModelError

RECIPE = Recipe(0.1, epochs=2, batch_size=4)
MASKS = random_subsets(12, 2, seed=1)
SLOPE = 1.0


def table(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator), torch.randint(2, (count,), generator=generator)


DATA, QUERIES = table(12, 0), table(5, 1)


def net():
    return nn.Linear(3, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return SLOPE * self.layer(x)


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def loss(self, outputs, targets):
        return self.factor * cross_entropy(outputs, targets)

    def __call__(self):
        module = net()
        with torch.no_grad():
            module.weight.mul_(self.factor)
        return module


def scaled_loss(outputs, targets, factor=1.0):
    return factor * cross_entropy(outputs, targets)


def closure(factor):
    def make():
        module = net()
        nn.init.normal_(module.weight, std=factor)
        return module

    return make


def run(factory=net, masks=MASKS, seeds=(0,), **options):
    return retrain(factory, RECIPE, DATA, masks, seeds, queries=QUERIES, **options)


CHANGES = {
    "closure of the factory": lambda k: {"factory": closure(k)},
    "factory object": lambda k: {"factory": Scale(k)},
    "partial loss": lambda k: {"loss": functools.partial(scaled_loss, factor=k)},
    "partial measurement": lambda k: {"measurement": functools.partial(scaled_loss, factor=k)},
    "bound loss": lambda k: {"loss": Scale(k).loss},
    "closure of the measurement": lambda k: {"measurement": lambda f, y: k * cross_entropy(f, y)},
    "default of the measurement": lambda k: {"measurement": lambda f, y, k=k: k * cross_entropy(f, y)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_value_never_meets_an_old_result(tmp_path, name):
    for factor in (1.0, 9.0, 1.0):
        stored = run(**CHANGES[name](factor), cache_dir=tmp_path)
        assert torch.equal(stored, run(**CHANGES[name](factor)))


@pytest.mark.parametrize("factory", [Net, lambda: Net()])
def test_a_global_that_the_model_names_counts(tmp_path, monkeypatch, factory):
    first = run(factory, cache_dir=tmp_path)
    monkeypatch.setitem(globals(), "SLOPE", 3.0)
    changed = run(factory, cache_dir=tmp_path)
    assert torch.equal(changed, run(factory))
    assert not torch.equal(changed, first)
    monkeypatch.undo()
    assert torch.equal(run(factory, cache_dir=tmp_path), first)


def test_values_stored_without_a_note_of_the_sources_are_still_found(tmp_path):
    """As versions before wrote them."""
    run(cache_dir=tmp_path)
    path = next(tmp_path.rglob("*.safetensors"))
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    assert torch.equal(run(cache_dir=tmp_path), run() + 1)


def test_the_key_of_plain_functions_is_what_it_always_was():
    """Ground truth of hours stands under such keys."""
    key = fingerprint(net, RECIPE, [torch.arange(3)], [cross_entropy])
    assert key == "ddd159e776d1c65c1ab2"


def test_what_cannot_be_described_is_refused_where_values_are_kept(tmp_path):
    state = iter(x for x in range(9))

    def measurement(outputs, targets):
        assert state is not None
        return cross_entropy(outputs, targets)

    run(measurement=measurement)
    with pytest.raises(TypeError, match=r"`state` is a builtins\.generator.* give no `cache_dir`"):
        run(measurement=measurement, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measurement": nn.functional.cross_entropy}, r"`measurement` returned shape \(\); .*\(5,\)"),
        ({"measurement": lambda f, y: f}, r"`measurement` returned shape \(5, 2\)"),
        ({"measurement": lambda f, y: f[:4, 0]}, r"`measurement` returned shape \(4,\)"),
        ({"measurement": lambda f, y: 1.0}, "`measurement` returned a float"),
        ({"loss": nn.functional.cross_entropy}, r"`loss` returned shape \(\); .*\(8,\)"),
        ({"loss": lambda f, y: f}, r"`loss` returned shape \(8, 2\)"),
    ],
)
def test_what_is_not_per_example_is_refused(options, message):
    with pytest.raises(ValueError, match=rf'{message}.*reduction="none"'):
        run(**options)


def test_several_values_an_example_are_measured():
    both = run(measurement=lambda f, y: torch.cat([cross_entropy(f, y), f[:, 0]]))
    assert both.shape == (2, 1, 10)
    assert torch.equal(both[..., :5], run())


@pytest.mark.parametrize("members", [1, 2])
def test_a_factory_of_one_model_is_refused(members):
    model, layer = net(), nn.Linear(3, 3)
    part = [Member(MASKS[0], seed) for seed in range(members)]
    with pytest.raises(UnsupportedModelError, match=r"`factory\(\)` returned the same object twice"):
        train_members(lambda: model, RECIPE, DATA, part)
    with pytest.raises(UnsupportedModelError, match=r"share the parameter '0\.weight'"):
        train_members(lambda: nn.Sequential(layer, net()), RECIPE, DATA, part)


def test_models_may_share_what_is_frozen():
    layer = nn.Linear(3, 3).requires_grad_(False)
    values = run(lambda: nn.Sequential(layer, net()), seeds=[0, 1])
    assert not torch.equal(values[:, 0], values[:, 1])


@pytest.mark.parametrize("seeds", [torch.tensor([0, 1]), np.array([0, 1]), range(2), [np.int64(0), 1]])
def test_seeds_are_any_sequence_of_integers(tmp_path, seeds):
    expected = run(seeds=[0, 1], cache_dir=tmp_path)
    assert torch.equal(run(seeds=seeds, cache_dir=tmp_path), expected)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 3}, "different integers, got 3"),
        ({"seeds": []}, r"different integers, got \[\]"),
        ({"seeds": [0.5]}, r"different integers, got \[0\.5\]"),
        ({"seeds": [True]}, r"different integers, got \[True\]"),
        ({"seeds": "01"}, "different integers, got '01'"),
        ({"seeds": torch.tensor([0.0])}, r"different integers, got tensor\(\[0\.\]\)"),
        ({"seeds": torch.tensor(3)}, r"different integers, got tensor\(3\)"),
        ({"masks": MASKS[:0]}, r"M at least 1 .* of shape \(0, 12\)"),
        ({"masks": MASKS.tolist()}, "got a list"),
        ({"masks": MASKS & False}, "Subset 0 keeps no example"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
