"""Streaming top-k against a full sort, whatever the batches, their order and the ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.results import top_k
from lightning_influence.results.top_k import StreamingExtremes, StreamingTopK, check_finite, select_topk
from lightning_influence.support.errors import NonFiniteError


def reference(scores, indices, k, largest):
    """Sorts in plain Python by (score, index)."""
    rows = []
    for row in scores.tolist():
        sign = -1 if largest else 1
        pairs = sorted(zip(row, indices.tolist(), strict=True), key=lambda pair: (sign * pair[0], pair[1]))
        rows.append(pairs[:k])
    return [[p[0] for p in row] for row in rows], [[p[1] for p in row] for row in rows]


@st.composite
def problems(draw):
    """Scores with many ties, distinct indices in any order, a partition into batches, and k."""
    n, q = draw(st.integers(1, 30)), draw(st.integers(1, 3))
    values = st.lists(st.integers(-2, 2), min_size=n, max_size=n)
    scores = torch.tensor([draw(values) for _ in range(q)], dtype=torch.float64) / 4
    indices = torch.tensor(draw(st.lists(st.integers(0, 60), min_size=n, max_size=n, unique=True)))
    cuts = sorted(draw(st.sets(st.integers(1, n), max_size=5)) | {n})
    return scores, indices, cuts, draw(st.integers(1, 12))


@settings(deadline=None, max_examples=25)
@given(problem=problems(), largest=st.booleans())
def test_batches_give_what_a_sort_of_everything_gives(problem, largest):
    scores, indices, cuts, k = problem
    stream = StreamingTopK(len(scores), k, largest=largest)
    for start, stop in zip([0, *cuts], cuts, strict=False):
        stream.update(scores[:, start:stop], indices[start:stop])
    want_scores, want_indices = reference(scores, indices, k, largest)
    for got in (stream.result(), select_topk(scores, indices, k, largest=largest)):
        assert got.indices.tolist() == want_indices
        assert got.scores.tolist() == want_scores
        assert got.scores.dtype == torch.float64


@settings(deadline=None, max_examples=25)
@given(problem=problems(), data=st.data())
def test_the_order_of_examples_does_not_matter(problem, data):
    scores, indices, cuts, k = problem
    order = torch.tensor(data.draw(st.permutations(range(len(indices)))))
    results = []
    for columns in (torch.arange(len(indices)), order):
        stream = StreamingExtremes(len(scores), k)
        for start, stop in zip([0, *cuts], cuts, strict=False):
            stream.update(scores[:, columns[start:stop]], indices[columns[start:stop]])
        results.append(stream.result())
    first, second = results
    assert torch.equal(first.train_indices, indices.sort().values)
    assert torch.equal(first.train_indices, second.train_indices)
    for a, b in ((first.top, second.top), (first.bottom, second.bottom)):
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.indices, b.indices)


def test_ties_at_the_edge_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    got = select_topk(scores, torch.tensor([9, 3, 5, 7]), 2)
    assert got.indices.tolist() == [[7, 3]]
    stream = StreamingTopK(1, 2)
    stream.update(torch.tensor([[1.0]]), torch.tensor([9]))
    stream.update(torch.tensor([[1.0]]), torch.tensor([8]))
    stream.update(torch.tensor([[1.0]]), torch.tensor([3]))
    assert stream.result().indices.tolist() == [[3, 8]]


def test_fewer_examples_than_k_and_none():
    stream = StreamingTopK(2, 5)
    assert stream.result().scores.shape == (2, 0)
    assert stream.result().indices.dtype == torch.long
    stream.update(torch.tensor([[1.0], [2.0]]), torch.tensor([4]))
    assert stream.result().indices.tolist() == [[4], [4]]


def test_memory_does_not_grow_with_the_examples():
    stream = StreamingTopK(3, 4)
    for start in range(0, 4000, 500):
        stream.update(torch.randn(3, 500), torch.arange(start, start + 500))
    assert stream.result().scores.untyped_storage().nbytes() <= 3 * 8 * 4
    assert stream.result().indices.untyped_storage().nbytes() <= 3 * 8 * 8


@pytest.mark.parametrize("kind", [StreamingTopK, StreamingExtremes])
def test_indices_that_come_twice_are_refused(kind):
    stream = kind(1, 2)
    with pytest.raises(ValueError, match=r"1 indices came twice, the first of them \[5\]"):
        stream.update(torch.zeros(1, 3), torch.tensor([5, 6, 5]))
    stream.update(torch.zeros(1, 2), torch.tensor([5, 6]))
    with pytest.raises(ValueError, match=r"came twice.*\[6\].*without replacement"):
        stream.update(torch.zeros(1, 2), torch.tensor([6, 700]))
    stream.update(torch.zeros(1, 1), torch.tensor([700]))


def test_non_finite_scores_are_refused_and_the_example_named():
    stream = StreamingTopK(2, 2)
    scores = torch.tensor([[0.0, 1.0], [2.0, float("nan")]])
    with pytest.raises(NonFiniteError, match=r"1 of 4 scores .* training example 11"):
        stream.update(scores, torch.tensor([10, 11]))
    with pytest.raises(NonFiniteError, match="training example 3"):
        check_finite(torch.tensor([float("inf"), 0.0]), torch.tensor([3, 4]))
    assert stream.result().scores.shape == (2, 0)


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        StreamingTopK(0, 3)
    with pytest.raises(ValueError, match="at least 1, got 2 and 0"):
        StreamingExtremes(2, 0)
    stream = StreamingTopK(2, 1)
    with pytest.raises(ValueError, match=r"expected scores \(2, B\) .*, got \(2, 3\) and \(2,\)"):
        stream.update(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"got torch\.int64 and torch\.int64"):
        stream.update(torch.zeros(2, 1, dtype=torch.long), torch.tensor([0]))
    with pytest.raises(ValueError, match="0 or higher, got -1"):
        stream.update(torch.zeros(2, 1), torch.tensor([-1]))
    stream.update(torch.zeros(2, 1), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"were torch.float32 on cpu, now torch.float64"):
        stream.update(torch.zeros(2, 1, dtype=torch.float64), torch.tensor([1]))


def test_result_holds_no_graph():
    stream = StreamingTopK(1, 1)
    stream.update(torch.ones(1, 2, requires_grad=True) * 2, torch.tensor([0, 1]))
    assert not stream.result().scores.requires_grad


@pytest.mark.parametrize("largest", [True, False])
def test_rows_that_are_ranked_in_turns_are_ranked_alike(monkeypatch, largest):
    scores, indices = torch.randint(4, (9, 20)).float(), torch.randperm(40)[:20]
    whole = select_topk(scores, indices, 6, largest=largest)
    for at_once in (1, 45, 60):
        monkeypatch.setattr(top_k, "_SCORES_AT_ONCE", at_once)
        parts = select_topk(scores, indices, 6, largest=largest)
        assert torch.equal(parts.scores, whole.scores)
        assert torch.equal(parts.indices, whole.indices)
    assert select_topk(scores[:0], indices, 6).scores.shape == (0, 6)
