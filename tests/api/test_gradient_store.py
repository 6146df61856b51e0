"""A gradient store answers as its closed form does, without the training data."""

import pytest
import torch
from influence_cases import CLOSE, DAMPING, EXACTLY, Asked, quiet
from models import CASES, loader
from torch import nn

from lightning_influence import InfluenceModule, InfluenceWarning
from lightning_influence.errors import CorruptFileError, FactorMismatchError
from lightning_influence.methods.gradient_store import GradientStore

WHOLE = {"numbers": 10**9, "dtype": torch.float64, "damping": DAMPING, **EXACTLY}


def build(asked, path, batch=5, **options):
    with quiet():
        return asked.module.build_store(loader(asked.case, batch, shuffle=True), path, **{**WHOLE, **options})


def ask(asked, store, **options):
    with quiet():
        return asked.module.ask_store(store, loader(asked.case, 2, queries=True), **options)


@pytest.fixture
def asked():
    return Asked(CASES["mlp_gelu"])


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_closed_form_where_nothing_is_cut(name, tmp_path):
    asked = Asked(CASES[name])
    store = build(asked, tmp_path / "store")
    found, expected = ask(asked, store), asked.expected("ekfac")
    torch.testing.assert_close(found.scores, expected, **CLOSE)
    assert found.train_indices.tolist() == list(range(len(asked.case.x)))
    assert not any("scores" in done["name"] for done in found.diagnostics.passes)
    torch.testing.assert_close(found.diagnostics.extra["energy_kept"], torch.ones(3, dtype=torch.float64))
    assert store.told["energy_kept"] == pytest.approx(1)
    assert store.told["relative_error"] == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("name", ["mlp_gelu", "conv", "tokens"])
def test_self_influence_is_exact_however_little_is_kept(name, tmp_path):
    case = next(case for key, case in CASES.items() if name in key)
    asked = Asked(case)
    store = build(asked, tmp_path / "store", numbers=3)
    expected = asked.self_influence(method="ekfac", self_influence_tolerance=0.0, **EXACTLY)
    torch.testing.assert_close(store.self_influence().scores, expected.scores, **CLOSE)


@pytest.mark.parametrize("method", ["kfac", "diagonal"])
def test_other_closed_forms(asked, method, tmp_path):
    store = build(asked, tmp_path / "store", method=method)
    torch.testing.assert_close(ask(asked, store).scores, asked.expected(method), **CLOSE)


def test_what_is_told_of_scores_that_are_cut(asked, tmp_path):
    """The error told is that of the examples that were compared, the energy that of all."""
    torch.manual_seed(0)
    case = asked.case
    train = loader(case, 12)
    with quiet():
        store = asked.module.build_store(train, tmp_path / "store", **{**WHOLE, "numbers": 4})
        own = asked.module.ask_store(store, train).scores
    rows = store.rows * store.scales[:, None]
    own_squares = rows.square().sum(1)
    assert store.told["energy_kept"] == pytest.approx(float(own_squares.sum() / store.squares.sum()))
    with quiet():
        exact = asked.module.scores(train, train, method="ekfac", damping=DAMPING, **EXACTLY).scores
    pairs = slice(0, 6), slice(6, 12)
    expected = (own[pairs] - exact[pairs]).norm() / exact[pairs].norm()
    assert store.told["pairs"] == 36
    assert store.told["relative_error"] == pytest.approx(float(expected), rel=1e-6)
    assert 0 < store.told["relative_error"] < 1
    ranks = [
        torch.corrcoef(torch.stack([a[q, 6:].argsort().argsort() for a in (own, exact)]).double())[0, 1]
        for q in range(6)
    ]
    assert store.told["rank_correlation"] == pytest.approx(float(torch.stack(ranks).mean()))
    found = ask(asked, store).diagnostics.extra["energy_kept"]
    assert bool((found > 0).all())
    assert bool((found < 1).all())


def test_the_coordinates_with_the_largest_share_of_signal_are_kept(asked, tmp_path):
    store = build(asked, tmp_path / "store", numbers=2, memory_budget=2**10)
    shares = torch.cat([(x.eigenvalues * x.weights).flatten() for x in store.kept.inverse.layers.values()])
    chosen, start = [], 0
    for name, layer in store.kept.inverse.layers.items():
        chosen.append(store.kept.kept[name] + start)
        start += layer.eigenvalues.numel()
    left_out = torch.ones(len(shares), dtype=torch.bool).index_fill_(0, torch.cat(chosen), False)
    assert store.told["candidates"] == 5  # of 2**10 bytes a quarter holds a matrix of 5 x 5
    assert shares[~left_out].min() >= shares[left_out].max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_of_the_stored_numbers(asked, dtype, tmp_path):
    store = build(asked, tmp_path / "store", dtype=dtype)
    found, expected = ask(asked, store).scores, asked.expected("ekfac")
    assert 0 < float((found - expected).norm() / expected.norm()) < torch.finfo(dtype).eps
    assert store.bytes_per_example == store.told["numbers"] * store.rows.element_size() + 24
    file = tmp_path / "store" / store.facts.rows
    assert file.stat().st_size == store.rows.nbytes


def test_results_are_ordinary_ones(asked, tmp_path):
    store = build(asked, tmp_path / "store")
    whole, expected = ask(asked, store), asked.expected("ekfac")
    few = ask(asked, store, top_k=2)
    assert torch.equal(few.top(2).indices, whole.top(2).indices)
    torch.testing.assert_close(
        ask(asked, store, aggregate="mean").scores, expected.mean(0, keepdim=True), **CLOSE
    )
    labels = [index % 3 for index in range(len(asked.case.x))]
    grouped = ask(asked, store, train_groups=labels).scores
    sums = torch.stack([expected[:, group::3].sum(1) for group in range(3)], dim=1)
    torch.testing.assert_close(grouped, sums, **CLOSE)
    measured = ask(asked, store, measurement=lambda module, batch: module(batch[0])[:, 0])
    with quiet():
        known = asked.module.scores(
            loader(asked.case, 5),
            loader(asked.case, 2, queries=True),
            method="ekfac",
            damping=DAMPING,
            measurement=lambda module, batch: module(batch[0])[:, 0],
            **EXACTLY,
        )
    torch.testing.assert_close(measured.scores, known.scores, **CLOSE)
    one_by_one = ask(asked, store, memory_budget=1)
    torch.testing.assert_close(one_by_one.scores, expected, **CLOSE)


def test_a_store_is_opened_by_another_module_without_factors(asked, tmp_path):
    store = build(asked, tmp_path / "store", layers=["model.*", "!model.0"])
    opened = GradientStore.load(tmp_path / "store", verify=True)
    assert opened.told == store.told
    other = InfluenceModule(asked.module.model)
    queries = loader(asked.case, 2, queries=True)
    found = other.ask_store(opened, queries)
    assert other.state.factors is None
    assert torch.equal(found.scores, ask(asked, store).scores)
    assert set(found.diagnostics.layers) == set(store.kept.inverse.layers)
    assert "model.0" not in found.diagnostics.layers
    assert found.diagnostics.damping == dict.fromkeys(found.diagnostics.layers, DAMPING)


def test_examples_keep_the_indices_of_their_dataset(asked, tmp_path):
    case = asked.case
    data = torch.utils.data.TensorDataset(case.x, case.y)
    sampler = torch.utils.data.SubsetRandomSampler([7, 2, 5])
    with quiet():
        store = asked.module.build_store(
            torch.utils.data.DataLoader(data, 2, sampler=sampler), tmp_path / "store", **WHOLE
        )
        groups = ask(asked, store, train_groups=["a"] * len(case.x))
    assert ask(asked, store).train_indices.tolist() == [2, 5, 7]
    assert groups.train_counts.tolist() == [3]
    assert store.self_influence().train_indices.tolist() == [2, 5, 7]


def test_a_store_of_other_weights_is_refused(asked, tmp_path):
    store = build(asked, tmp_path / "store")
    with torch.no_grad():
        next(asked.module.model.parameters()).mul_(1.01)
    with pytest.raises(FactorMismatchError, match="other weights than the model has now"):
        ask(asked, store)
    with pytest.raises(FactorMismatchError, match="differ in"):
        ask(Asked(CASES["mlp_mse"]), store)


def test_other_buffers_are_told(tmp_path):
    case = next(
        case
        for case in CASES.values()
        if any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in case.model.modules())
    )
    asked = Asked(case)
    store = build(asked, tmp_path / "store")
    next(asked.module.model.buffers()).add_(1.0)
    with pytest.warns(InfluenceWarning, match="other buffers"):
        asked.module.ask_store(store, loader(case, 2, queries=True))


def test_a_new_store_replaces_the_old_one(asked, tmp_path):
    path = tmp_path / "store"
    old = build(asked, path)
    before = ask(asked, old).scores
    new = build(asked, path, numbers=4)
    assert sorted(file.name for file in path.iterdir()) == sorted([new.facts.rows, "store.safetensors"])
    assert torch.equal(ask(asked, old).scores, before)  # who has it open keeps it


def test_a_failed_build_leaves_the_old_one(asked, tmp_path):
    path = tmp_path / "store"
    old = build(asked, path)
    other, seen = InfluenceModule(asked.module.model, asked.module.state.factors), []

    def loss(module, batch):
        seen.append(batch)
        if len(seen) > 8:
            raise RuntimeError("stop")
        return module.training_step(batch, 0)

    with quiet(), pytest.raises(RuntimeError, match="stop"):
        other.build_store(loader(asked.case, 1), path, loss=loss, **WHOLE)
    assert sorted(file.name for file in path.iterdir()) == sorted([old.facts.rows, "store.safetensors"])
    assert torch.equal(GradientStore.load(path).rows, old.rows)


def test_damaged_files_are_refused(asked, tmp_path):
    path = tmp_path / "store"
    store = build(asked, path)
    rows = path / store.facts.rows
    content = rows.read_bytes()
    rows.write_bytes(content[:-8])
    with pytest.raises(CorruptFileError, match="expected are"):
        GradientStore.load(path)
    rows.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    GradientStore.load(path)
    with pytest.raises(CorruptFileError, match="altered"):
        GradientStore.load(path, verify=True)
    rows.unlink()
    with pytest.raises(CorruptFileError, match="is missing"):
        GradientStore.load(path)
    with pytest.raises(FileNotFoundError):
        GradientStore.load(tmp_path / "none")


def test_arguments_are_checked(asked, tmp_path):
    for wrong in ({"method": "auto"}, {"numbers": 0}, {"dtype": torch.int8}):
        with pytest.raises(ValueError, match=f"Got {next(iter(wrong))}="):
            build(asked, tmp_path / "store", **wrong)
    with pytest.raises(TypeError, match="accepted is a GradientStore"):
        ask(asked, "store")
    assert not (tmp_path / "store").exists()


def test_the_first_process_builds_alone(asked, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    with pytest.raises(RuntimeError, match=r"rank 1; accepted is rank 0 alone.*trainer\.is_global_zero"):
        build(asked, tmp_path / "store")
    assert not (tmp_path / "store").exists()
