from dataclasses import replace

import pytest
import torch
from benchmarks import load_benchmark
from torch import nn

from lightning_influence.evaluation.lds import random_subsets
from lightning_influence.evaluation.losses import cross_entropy
from lightning_influence.support.errors import CorruptFileError, UnsupportedModelError

stacked_training, Recipe = load_benchmark("stacked_training"), load_benchmark("recipes").Recipe
Member, retrain, train_members = (
    stacked_training.Member,
    stacked_training.retrain,
    stacked_training.train_members,
)

RECIPE = Recipe(0.1, epochs=3, batch_size=4, momentum=0.9)
MASKS = random_subsets(20, 3, seed=1)


def net():
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).double()


def table(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=generator)


DATA, QUERIES = table(20, 0), table(7, 1)


def run(masks=MASKS, seeds=(0, 1), recipe=RECIPE, data=DATA, **options):
    return retrain(net, recipe, data, masks, seeds, queries=QUERIES, **options)


@pytest.fixture
def counted(monkeypatch):
    """Number of runs trained since the test began."""
    trained = []

    def spy(factory, recipe, data, members, loss):
        trained.extend(members)
        return train_members(factory, recipe, data, members, loss)

    monkeypatch.setattr(stacked_training, "train_members", spy)
    return trained


def test_values_are_the_losses_of_the_trained_models():
    values = run()
    assert values.shape == (3, 2, 7)
    for subset in range(3):
        for seed in range(2):
            parameters = train_members(net, RECIPE, DATA, [Member(MASKS[subset], seed)])
            model = net()
            model.load_state_dict({name: value[0] for name, value in parameters.items()})
            expected = cross_entropy(model(QUERIES[0]), QUERIES[1]).detach()
            torch.testing.assert_close(values[subset, seed], expected, rtol=1e-10, atol=1e-12)


def test_subsets_share_the_noise_of_their_seed():
    """One example swapped for its twin changes nothing: all that is random follows the seed."""
    inputs, targets = (tensor.clone() for tensor in DATA)
    inputs[1], targets[1] = inputs[0], targets[0]
    # Neighbours in every order they are not, so the batches must not matter: one batch an epoch.
    masks = torch.ones(2, 20, dtype=torch.bool)
    masks[0, 0] = masks[1, 1] = False
    values = run(masks, (0, 1), replace(RECIPE, batch_size=20), (inputs, targets))
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(values[:, 0], values[:, 1], rtol=1e-3)


def test_another_measurement_is_measured():
    def logit(outputs, targets):
        return outputs.gather(1, targets[:, None]).squeeze(1)

    parameters = train_members(net, RECIPE, DATA, [Member(MASKS[0], 0)])
    model = net()
    model.load_state_dict({name: value[0] for name, value in parameters.items()})
    expected = model(QUERIES[0])[torch.arange(7), QUERIES[1]].detach()
    values = run(MASKS[:1], [0], measurement=logit)
    torch.testing.assert_close(values[0, 0], expected, rtol=1e-10, atol=1e-12)


def test_measuring_is_in_eval_mode():
    def dropping():
        return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()

    parameters = {name: value.detach()[None] for name, value in dropping().named_parameters()}
    first, second = (stacked_training.measure_members(dropping, parameters, QUERIES) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_do_not_change_the_values(chunk):
    torch.testing.assert_close(run(chunk=chunk), run(), rtol=1e-10, atol=1e-12)


def test_finished_runs_come_from_the_cache(tmp_path, counted):
    first = run(cache_dir=tmp_path)
    assert len(counted) == 6
    assert torch.equal(run(cache_dir=tmp_path), first)
    assert len(counted) == 6


def test_more_seeds_and_subsets_train_only_what_is_new(tmp_path, counted):
    small = run(MASKS[:2], [0], cache_dir=tmp_path)
    large = run(MASKS, [1, 0], cache_dir=tmp_path)
    assert len(counted) == 6
    assert torch.equal(large[:2, 1], small[:, 0])


def test_repeated_subsets_are_trained_once(counted):
    values = run(MASKS[[0, 0]], [0])
    assert len(counted) == 1
    assert torch.equal(values[0], values[1])


def test_an_interrupted_computation_goes_on(tmp_path, counted):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cache_dir=tmp_path, chunk=2, progress=interrupt)
    assert len(counted) == 2
    seen = []
    run(cache_dir=tmp_path, chunk=2, progress=lambda done, total: seen.append((done, total)))
    assert len(counted) == 6
    assert seen == [(4, 6), (6, 6)]


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(values, path):
        raise OSError("disk full")

    monkeypatch.setattr(stacked_training, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        run(cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "changes", [{"recipe": replace(RECIPE, epochs=2)}, {"data": (DATA[0] + 1e-9, DATA[1])}, {"loss": "other"}]
)
def test_a_change_of_what_decides_the_result_is_a_new_computation(tmp_path, counted, changes):
    def halved(outputs, targets):
        return cross_entropy(outputs, targets) / 2

    run(cache_dir=tmp_path)
    run(cache_dir=tmp_path, **{key: halved if key == "loss" else value for key, value in changes.items()})
    assert len(counted) == 12


def test_a_changed_architecture_is_a_new_computation(tmp_path, counted):
    def wider():
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()

    run(cache_dir=tmp_path)
    retrain(wider, RECIPE, DATA, MASKS, [0, 1], queries=QUERIES, cache_dir=tmp_path)
    assert len(counted) == 12


def test_a_truncated_file_is_named(tmp_path):
    run(cache_dir=tmp_path)
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptFileError, match=rf"{path.name} cannot be read .* Delete it"):
        run(cache_dir=tmp_path)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"N = 20 training examples, got torch.bool of shape \(3, 19\)"):
        run(MASKS[:, 1:])
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        run(MASKS.float())
    with pytest.raises(ValueError, match=r"different integers, got \[1, 1\]"):
        run(seeds=[1, 1])
    with pytest.raises(ValueError, match="20 training inputs but 19 targets"):
        run(data=(DATA[0], DATA[1][1:]))
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        run(chunk=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measurement": nn.functional.cross_entropy}, r"`measurement` returned shape \(\); .*\(7,\)"),
        ({"measurement": lambda f, y: f}, r"`measurement` returned shape \(7, 3\)"),
        ({"measurement": lambda f, y: f[:4, 0]}, r"`measurement` returned shape \(4,\)"),
        ({"measurement": lambda f, y: 1.0}, "`measurement` returned a float"),
        ({"loss": nn.functional.cross_entropy}, r"`loss` returned shape \(\); .*\(24,\)"),
        ({"loss": lambda f, y: f}, r"`loss` returned shape \(24, 3\)"),
    ],
)
def test_what_is_not_per_example_is_refused(options, message):
    with pytest.raises(ValueError, match=rf'{message}.*reduction="none"'):
        run(**options)


def test_several_values_an_example_are_measured():
    both = run(measurement=lambda f, y: torch.cat([cross_entropy(f, y), f[:, 0]]))
    assert both.shape == (3, 2, 14)
    assert torch.equal(both[..., :7], run())


@pytest.mark.parametrize("members", [1, 2])
def test_a_factory_of_one_model_is_refused(members):
    model, layer = net(), nn.Linear(5, 5).double()
    part = [Member(MASKS[0], seed) for seed in range(members)]
    with pytest.raises(UnsupportedModelError, match=r"`factory\(\)` returned the same object twice"):
        train_members(lambda: model, RECIPE, DATA, part)
    with pytest.raises(UnsupportedModelError, match=r"share the parameter '0\.weight'"):
        train_members(lambda: nn.Sequential(layer, net()), RECIPE, DATA, part)


def test_models_may_share_what_is_frozen():
    layer = nn.Linear(5, 5).double().requires_grad_(False)
    values = retrain(lambda: nn.Sequential(layer, net()), RECIPE, DATA, MASKS[:2], range(2), queries=QUERIES)
    assert not torch.equal(values[:, 0], values[:, 1])
