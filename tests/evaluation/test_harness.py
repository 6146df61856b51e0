"""Retraining through Lightning: fresh objects, caching, resumption after a kill, refusals."""

import logging
from dataclasses import replace
from importlib import metadata

import harness_models as models
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lightning_influence.evaluation import Retraining, retrain_subsets
from lightning_influence.evaluation.harness.run import derive_seed
from lightning_influence.support.errors import (
    CorruptFileError,
    InfluenceError,
    NonFiniteError,
    UnsupportedDataError,
    UnsupportedModelError,
    UnsupportedTrainerError,
)

RIDGE = Retraining(models.ridge, models.trainer, models.data, models.loader, models.queries)
MASKS = torch.ones(3, 8, dtype=torch.bool).scatter(1, torch.tensor([[0], [3], [7]]), value=False)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def run(retraining=RIDGE, masks=MASKS, seeds=(0, 1), processes=0, **options):
    return retrain_subsets(retraining, masks, seeds, processes=processes, progress=False, **options)


def by_hand(mask, seed):
    """Full-batch gradient descent on the kept examples."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "init"))
        layer = models.Ridge().layer
    x, y = (tensor[mask] for tensor in models.data().tensors)
    for _ in range(models.EPOCHS):
        grads = torch.autograd.grad((layer(x) - y).square().mean(), list(layer.parameters()))
        for parameter, grad in zip(layer.parameters(), grads, strict=True):
            parameter.data -= models.RATE * grad
    x, y = models.draw(5, 1).tensors
    return (layer(x) - y).square().mean(1).detach()


def test_values_are_those_of_gradient_descent_on_the_subset():
    values = run()
    assert values.shape == (3, 2, 5)
    expected = torch.stack([torch.stack([by_hand(mask, seed) for seed in (0, 1)]) for mask in MASKS])
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_processes_give_the_values_of_one_process_and_a_killed_worker_loses_only_its_own_run(
    tmp_path, monkeypatch
):
    """Two runs finish, the third kills its process; only what was not finished is trained again."""
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv("HARNESS_TEST_FOLDER", str(marks))
    counted = replace(RIDGE, module=models.counted)
    with pytest.raises(InfluenceError, match=r"A worker process died .* kept in .* Call again to go on"):
        run(counted, processes=1, cache_dir=tmp_path / "cache", cache_key="ridge")
    assert (marks / "died").exists()
    assert len(list(marks.glob("run-*"))) == 2
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    values = run(counted, processes=2, cache_dir=tmp_path / "cache", cache_key="ridge")
    assert len(list(marks.glob("run-*"))) == 6
    torch.testing.assert_close(values, run(), rtol=1e-10, atol=1e-12)
    assert torch.equal(run(counted, processes=2, cache_dir=tmp_path / "cache", cache_key="ridge"), values)
    assert len(list(marks.glob("run-*"))) == 6


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Runs in this process, and how many of them there were."""
    (tmp_path / "marks").mkdir()
    (tmp_path / "marks" / "died").touch()
    monkeypatch.setenv("HARNESS_TEST_FOLDER", str(tmp_path / "marks"))
    return replace(RIDGE, module=models.counted), lambda: len(list((tmp_path / "marks").glob("run-*")))


def test_more_seeds_train_only_what_is_new(tmp_path, counted):
    retraining, count = counted
    small = run(retraining, MASKS[:2], [1], cache_dir=tmp_path, cache_key="ridge")
    large = run(retraining, MASKS[[0, 0, 1]], [0, 1], cache_dir=tmp_path, cache_key="ridge")
    assert count() == 4
    assert torch.equal(large[[0, 2], 1], small[:, 0])
    assert torch.equal(large[0], large[1])


@pytest.mark.parametrize("change", ["key", "measurement", "versions"])
def test_another_key_measurement_or_version_is_a_new_computation(tmp_path, counted, change, monkeypatch):
    retraining, count = counted
    cache = {"cache_dir": tmp_path, "cache_key": "ridge"}
    run(retraining, MASKS[:1], [0], **cache)
    run(retraining, MASKS[:1], [0], **cache)
    assert count() == 1
    if change == "key":
        cache["cache_key"] = "ridge, 3 epochs"
    elif change == "measurement":
        retraining = replace(retraining, measurement=models.prediction)
    else:
        monkeypatch.setattr(metadata, "version", lambda name: "0")
    run(retraining, MASKS[:1], [0], **cache)
    assert count() == 2


def test_the_key_alone_stands_for_the_factories(tmp_path, counted):
    """What they do is not looked at, which the documentation says."""
    retraining, count = counted
    cache = {"cache_dir": tmp_path, "cache_key": "ridge"}
    first = run(retraining, MASKS[:1], [0], **cache)
    other = replace(retraining, trainer=lambda: models.trainer(max_epochs=3))
    assert torch.equal(run(other, MASKS[:1], [0], **cache), first)
    assert count() == 1


@pytest.mark.parametrize("key", [None, "", "  ", 3])
def test_a_folder_without_a_key_is_refused(tmp_path, key):
    with pytest.raises(
        ValueError, match=r"Got cache_key=.* names all that decides a run .*: module, trainer,"
    ):
        run(cache_dir=tmp_path, cache_key=key)


def test_a_key_without_a_folder_is_refused():
    with pytest.raises(ValueError, match="Got cache_key='ridge' without cache_dir"):
        run(cache_key="ridge")


def test_kept_runs_of_other_queries_are_refused(tmp_path):
    cache = {"cache_dir": tmp_path, "cache_key": "ridge"}
    run(RIDGE, MASKS[:1], [0], **cache)
    fewer = replace(RIDGE, queries=lambda: DataLoader(models.draw(4, 1)))
    with pytest.raises(ValueError, match=r"cache_key='ridge' measured \[4, 5\] queries. Choose another"):
        run(fewer, MASKS[:2], [0], **cache)


def test_the_cache_of_versions_before_is_not_found(tmp_path, counted):
    """Their folders were named by a hash of the code."""
    retraining, count = counted
    old = tmp_path / ("0" * 24)
    old.mkdir()
    run(retraining, MASKS[:1], [0], cache_dir=tmp_path, cache_key="ridge")
    for path in tmp_path.glob("*/*.safetensors"):
        path.rename(old / path.name)
    run(retraining, MASKS[:1], [0], cache_dir=tmp_path, cache_key="ridge")
    assert count() == 2


def test_a_function_is_measured():
    values = run(replace(RIDGE, measurement=models.prediction), MASKS[:1], [0])
    y = models.draw(5, 1).tensors[1]
    torch.testing.assert_close(
        (values[0, 0] - y[:, 0]).square(), by_hand(MASKS[0], 0), rtol=1e-10, atol=1e-12
    )
    wrong = replace(RIDGE, measurement=lambda module, batch: module.layer(batch[0]))
    with pytest.raises(ValueError, match=r"returned \(2, 1\); accepted is one value an example, \(2,\)"):
        run(wrong, MASKS[:1], [0])


def test_values_are_in_the_order_of_the_data_set_whatever_the_loader():
    generator = torch.Generator().manual_seed(3)
    shuffled = replace(
        RIDGE, queries=lambda: DataLoader(models.draw(5, 1), 2, shuffle=True, generator=generator)
    )
    assert torch.equal(run(shuffled, MASKS[:1], [0]), run(RIDGE, MASKS[:1], [0]))


def test_progress_is_reported(counted):
    seen = []
    retrain_subsets(
        counted[0], MASKS[:2], [0], processes=0, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(RIDGE, MASKS[:1], [0])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"module": models.same_module},
            UnsupportedModelError,
            r"same object twice.*Build the module inside",
        ),
        ({"module": models.shared_layer}, UnsupportedModelError, r"share the parameter 'layer\.weight'"),
        (
            {"trainer": models.same_trainer},
            UnsupportedTrainerError,
            "same object twice: a Trainer that has fitted",
        ),
        (
            {"trainer": models.idle_trainer},
            UnsupportedTrainerError,
            "seed 0 on 7 examples did no optimizer step",
        ),
        ({"module": models.diverging}, NonFiniteError, r"seed 0 on 7 examples diverged: \['layer\.weight'"),
        (
            {"loader": lambda dataset: DataLoader(models.data())},
            UnsupportedDataError,
            "was given 7 examples and returned a loader of 8",
        ),
        (
            {"module": lambda: torch.nn.Linear(1, 1)},
            TypeError,
            r"`module\(\)` returned a Linear; accepted is",
        ),
        ({"trainer": lambda: None}, TypeError, r"`trainer\(\)` returned a NoneType"),
        ({"data": lambda: iter([])}, ValueError, "without length or indices; accepted is a map-style"),
    ],
)
def test_what_would_measure_nothing_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        run(replace(RIDGE, **changes), MASKS[:1], [0])


def test_a_trainer_handed_out_again_later_is_refused():
    """The check before the runs sees two Trainers, then the factory starts to repeat itself."""
    handed = [models.trainer() for _ in range(3)]
    supply = iter([*handed, handed[2]])
    with pytest.raises(UnsupportedTrainerError, match="has done 2 steps"):
        run(replace(RIDGE, trainer=lambda: next(supply)), MASKS[:2], [0])


def test_functions_that_a_worker_cannot_import_are_refused():
    class Local(LightningModule):
        pass

    for function in (lambda: models.Ridge(), Local):
        with pytest.raises(
            ValueError, match=r"`module` is .*<locals>.* which a worker process cannot import"
        ):
            run(replace(RIDGE, module=function), processes=1)


def test_a_damaged_file_is_named(tmp_path):
    run(RIDGE, MASKS[:1], [0], cache_dir=tmp_path, cache_key="ridge")
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptFileError, match=rf"{path.name}.*Delete .* its run will be repeated"):
        run(RIDGE, MASKS[:1], [0], cache_dir=tmp_path, cache_key="ridge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": MASKS[:, 1:]}, r"N = 8 training examples, got torch\.bool of shape \(3, 7\)"),
        ({"masks": MASKS.float()}, r"got torch\.float32"),
        ({"masks": torch.zeros(1, 8, dtype=torch.bool)}, "Subset 0 keeps no example"),
        ({"masks": MASKS[:0]}, r"M at least 1 .* of shape \(0, 8\)"),
        ({"masks": MASKS.tolist()}, "got a list"),
        ({"seeds": [1, 1]}, r"different integers, got \[1, 1\]"),
        ({"seeds": 3}, "different integers, got 3"),
        ({"seeds": []}, r"different integers, got \[\]"),
        ({"seeds": [0.5]}, r"different integers, got \[0\.5\]"),
        ({"seeds": [True]}, r"different integers, got \[True\]"),
        ({"seeds": "01"}, "different integers, got '01'"),
        ({"seeds": torch.tensor([0.0])}, r"different integers, got tensor\(\[0\.\]\)"),
        ({"seeds": torch.tensor(3)}, r"different integers, got tensor\(3\)"),
        ({"seeds": torch.tensor([1, 1])}, r"different integers, got tensor\(\[1, 1\]\)"),
        ({"processes": -1}, "Got processes=-1; accepted are integers of at least 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


@pytest.mark.parametrize("seeds", [torch.tensor([0, 1]), np.array([0, 1]), range(2), [np.int64(0), 1]])
def test_seeds_are_any_sequence_of_integers(tmp_path, seeds):
    expected = run(masks=MASKS[:1], seeds=[0, 1], cache_dir=tmp_path, cache_key="ridge")
    assert torch.equal(run(masks=MASKS[:1], seeds=seeds, cache_dir=tmp_path, cache_key="ridge"), expected)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_seeds_of_parts_follow_the_seed_and_the_purpose():
    seeds = [derive_seed(0, "init"), derive_seed(1, "init"), derive_seed(0, "order")]
    assert len(set(seeds)) == 3
    assert derive_seed(0, "init") == seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)
