"""Attributions and self-influence: checks, rankings, groups, files and data frames."""

import dataclasses
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from result_examples import QUERIES, TRAIN, K, N, Q, diagnostics, ends, full, self_influence

from lightning_influence.results.attributions import Attributions
from lightning_influence.results.diagnostics import Diagnostics
from lightning_influence.results.self_influence import SelfInfluence
from lightning_influence.support.errors import CorruptFileError, NonFiniteError
from lightning_influence.support.storage import load_tensors, save_tensors


def assert_same(a, b):
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, Diagnostics):
            assert_same(x, y)
        elif f.name == "extra":
            assert x.keys() == y.keys()
            assert all(torch.equal(torch.as_tensor(x[key]), torch.as_tensor(y[key])) for key in x)
        elif isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
        else:
            assert x == y


def test_top_and_bottom_are_the_sorted_ends_in_dataset_numbering():
    attributions = full()
    top, bottom = attributions.top(2), attributions.bottom(2)
    for row in range(Q):
        order = attributions.scores[row].argsort(descending=True)
        assert top.indices[row].tolist() == TRAIN[order[:2]].tolist()
        assert bottom.indices[row].tolist() == TRAIN[order.flip(0)[:2]].tolist()
        assert torch.equal(top.scores[row], attributions.scores[row, order[:2]])


@settings(deadline=None, max_examples=25)
@given(k=st.integers(1, N), shown=st.integers(1, N))
def test_stored_ends_answer_as_all_scores_do(k, shown):
    stored, everything = ends(k), full()
    shown = min(shown, k)
    for got, want in (
        (stored.top(shown), everything.top(shown)),
        (stored.bottom(shown), everything.bottom(shown)),
    ):
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.scores, want.scores)
    assert torch.equal(stored.train_indices, TRAIN.sort().values)


def test_more_than_is_stored_is_refused():
    with pytest.raises(
        ValueError, match=r"k=4, but 3 examples per query are stored \(top_k=3\); k is 1 to 3"
    ):
        ends().top(4)
    with pytest.raises(ValueError, match=r"k=9, but 8 examples .* \(all scores are stored\)"):
        full().bottom(9)
    with pytest.raises(ValueError, match="k=0"):
        full().top(0)
    with pytest.raises(ValueError, match="k=9, but 8"):
        self_influence().top(9)


def test_titles_claim_help_only_for_the_loss():
    assert full().top(1).title == "Strongest proponents"
    margin = full(diagnostics=diagnostics(measurement="margin"))
    assert margin.top(1).title == "Highest scores"
    assert "the margin rises without the example" in margin.top(1).caption
    assert "positive: the example helps the query" in full().bottom(1).caption


def test_a_group_is_the_sum_of_its_members():
    attributions = full()
    members = [20, 60, 50]
    columns = [TRAIN.tolist().index(member) for member in members]
    want = attributions.scores[:, columns].sum(1)
    torch.testing.assert_close(attributions.group(members), want, rtol=1e-14, atol=1e-15)
    assert torch.equal(attributions.group(torch.tensor(members)), attributions.group(members[::-1]))
    assert torch.equal(attributions.group([]), torch.zeros(Q, dtype=torch.float64))


def test_groups_that_cannot_be_summed_are_refused():
    with pytest.raises(ValueError, match="only 3 at either end are stored: omit top_k"):
        ends().group([20])
    with pytest.raises(ValueError, match="unknown examples: 21, 22;"):
        full().group([20, 21, 22])
    with pytest.raises(ValueError, match="an example twice"):
        full().group([20, 20])
    for group in ([20.5], [[20, 50]], {20, 50}, "20", 20, [True, False], None):
        with pytest.raises(ValueError, match=rf"Got a group of .*boolean mask of shape \({len(TRAIN)},\)"):
            full().group(group)


def test_a_group_may_be_a_mask():
    mask = torch.isin(TRAIN, torch.tensor([20, 60, 50]))
    for group in (mask, mask.numpy(), mask.tolist()):
        assert torch.equal(full().group(group), full().group([20, 50, 60]))


@pytest.mark.parametrize("make", [full, ends])
def test_for_query_keeps_the_rows_of_one_query(make):
    attributions = make()
    one = attributions.for_query(2)
    assert one.query_indices.tolist() == [2]
    assert torch.equal(one.top(3).indices, attributions.top(3).indices[1:2])
    assert torch.equal(one.diagnostics.residuals, torch.tensor([0.2]))
    assert one.diagnostics.method == "ekfac"
    with pytest.raises(ValueError, match="query 3 was not asked for; query_indices are 5, 2, 9"):
        attributions.for_query(3)


def test_for_query_tells_loaders_apart():
    attributions = full(query_indices=torch.tensor([2, 2, 9]), query_dataloaders=torch.tensor([0, 1, 1]))
    assert len(attributions.for_query(2).query_indices) == 2
    one = attributions.for_query(2, dataloader=1)
    assert torch.equal(one.scores, attributions.scores[1:2])
    with pytest.raises(ValueError, match="query 9 of dataloader 0 was not asked for"):
        attributions.for_query(9, dataloader=0)
    assert full().for_query(9, dataloader=0).query_indices.tolist() == [9]


@pytest.mark.parametrize(
    "make",
    [full, ends, self_influence, lambda: full(query_dataloaders=torch.tensor([0, 1, 1]))],
    ids=["full", "ends", "self", "loaders"],
)
def test_files_hold_everything(make, tmp_path):
    result = make()
    assert result.save(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert_same(result, type(result).load(tmp_path / "a.safetensors"))


def test_files_of_another_kind_or_content_are_refused(tmp_path):
    path = tmp_path / "a"
    self_influence().save(path)
    with pytest.raises(CorruptFileError, match="holds 'self-influence', expected 'attributions'"):
        Attributions.load(path)
    tensors, metadata = load_tensors(path)
    save_tensors(path, {**tensors, "scores": torch.zeros(3)}, metadata)
    with pytest.raises(
        CorruptFileError, match=r"sound self-influence: scores must have shape \(8,\), got \(3,\)"
    ):
        SelfInfluence.load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="truncated"):
        SelfInfluence.load(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_scores_are_refused(bad):
    scores = full().scores.clone()
    scores[1, 2] = bad
    with pytest.raises(NonFiniteError, match="training example 31"):
        full(scores=scores)
    stored = ends()
    with pytest.raises(NonFiniteError, match="bottom_scores hold NaN or infinity"):
        dataclasses.replace(stored, bottom_scores=stored.bottom_scores * bad)
    with pytest.raises(NonFiniteError, match="training example 50"):
        self_influence(scores=torch.full((N,), bad))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "got both, neither or a part"),
        ({"top_scores": torch.zeros(Q, 1)}, "got both, neither or a part"),
        ({"scores": torch.zeros(Q, N + 1)}, r"scores must have shape \(3, 8\), got \(3, 9\)"),
        ({"scores": torch.zeros(Q, N, dtype=torch.long)}, r"scores must be floating-point, got torch\.int64"),
        ({"train_indices": TRAIN.int()}, r"train_indices must be int64, got torch\.int32"),
        ({"train_indices": torch.zeros(N).long()}, r"train_indices must be \(N,\) and distinct"),
        ({"train_indices": TRAIN[:0], "scores": torch.zeros(Q, 0)}, "at least one training example"),
        (
            {"query_indices": QUERIES[:0], "scores": torch.zeros(0, N)},
            r"query_indices must have shape \(1,\)",
        ),
        ({"query_indices": QUERIES[None]}, r"query_indices must have shape \(1,\), got \(1, 3\)"),
        (
            {"query_dataloaders": torch.zeros(2).long()},
            r"query_dataloaders must have shape \(3,\), got \(2,\)",
        ),
        (
            {"diagnostics": diagnostics(residuals=torch.zeros(2))},
            r"residuals must have shape \(3,\), got \(2,\)",
        ),
    ],
)
def test_misfits_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        full(**changes)


def test_ends_that_are_not_ends_are_refused():
    stored = ends()
    with pytest.raises(ValueError, match="top_scores must be sorted, the strongest first"):
        dataclasses.replace(stored, top_scores=stored.top_scores.flip(1))
    with pytest.raises(ValueError, match="bottom_scores must be sorted"):
        dataclasses.replace(stored, bottom_scores=stored.bottom_scores.flip(1))
    with pytest.raises(ValueError, match="top_indices hold examples that train_indices does not"):
        dataclasses.replace(stored, top_indices=stored.top_indices + 1000)
    with pytest.raises(ValueError, match=r"bottom_indices must have shape \(3, 3\), got \(3, 2\)"):
        dataclasses.replace(stored, bottom_indices=stored.bottom_indices[:, :2])


def test_it_is_frozen_and_half_precision_is_held_in_float32():
    with pytest.raises(dataclasses.FrozenInstanceError):
        full().scores = None
    assert full(scores=torch.ones(Q, N, dtype=torch.bfloat16)).scores.dtype == torch.float32


def test_data_frames_are_long_and_agree():
    attributions = full(query_dataloaders=torch.tensor([0, 1, 1]))
    frame = attributions.to_pandas()
    assert list(frame.columns) == ["query", "dataloader", "train", "score"]
    assert len(frame) == Q * N
    row = frame[(frame["query"] == 2) & (frame["train"] == 31)].iloc[0]
    assert row["score"] == float(attributions.scores[1, 2])
    assert row["dataloader"] == 1

    frame = ends().to_pandas()
    assert list(frame.columns) == ["query", "train", "score", "end", "rank"]
    best = frame[(frame["end"] == "top") & (frame["rank"] == 1)]
    assert best["train"].tolist() == full().top(1).indices[:, 0].tolist()
    worst = frame[(frame["end"] == "bottom") & (frame["query"] == 9)]
    assert worst["score"].tolist() == full().bottom(K).scores[2].tolist()

    frame = self_influence().to_pandas()
    assert frame.loc[frame["score"].idxmax(), "train"] == 31


def test_without_pandas_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for result in (full(), ends(), self_influence()):
        with pytest.raises(ImportError, match=r"lightning-influence\[pandas\]"):
            result.to_pandas()


def test_self_influence_ranks_all_examples():
    result = self_influence()
    assert result.top(3).indices.tolist() == [[31, 11, 99]]
    assert result.bottom(2).indices.tolist() == [[20, 40]]
    assert "own loss" in result.top(1).caption


def test_reprs_are_one_line():
    assert repr(full()) == "Attributions(Q=3, N=8, full, method='ekfac', measurement='loss')"
    assert repr(ends()) == "Attributions(Q=3, N=8, top_k=3, method='ekfac', measurement='loss')"
    assert repr(self_influence()) == "SelfInfluence(N=8, method='ekfac')"
