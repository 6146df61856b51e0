"""The answer to all queries is put together in place, group after group and over processes."""

from types import SimpleNamespace

import pytest
import torch

from lightning_influence.methods.answers import Answer
from lightning_influence.methods.gathering import Gathered
from lightning_influence.methods.options import Options

ORDER = torch.tensor([5, 2, 9, 0, 7])  # how the training examples are visited
GROUPS = [3, 3, 1]


class Alone:
    world_size = 1

    def all_reduce_sum(self, tensor):
        raise AssertionError("there is one process")

    all_gather_cat = all_reduce_sum


class Pair:
    """The first of two processes; the second one is asked for its part of whatever is summed or joined."""

    world_size = 2

    def __init__(self):
        self.others = []

    def all_reduce_sum(self, tensor):
        return tensor.add_(self.others.pop(0))

    def all_gather_cat(self, tensor):
        return torch.cat([tensor, self.others.pop(0)])


def context(runner):
    return SimpleNamespace(
        runner=runner,
        train=SimpleNamespace(indices=ORDER),
        dtype=torch.float64,
        options=Options(memory_budget=16 * 8 * 3 * 2),
    )


def queries(rows):
    indices = torch.arange(10, 17)[rows]
    return Gathered({}, indices, indices % 2)


def fill(answer, scores, seen, residuals=None):
    start = 0
    for count in GROUPS:
        rows = slice(start, start + count)
        sink = answer.begin(count)
        for columns in torch.split(seen, 2):
            sink.update(scores[rows][:, columns], ORDER[columns])
        answer.end(queries(rows), 0.5, None if residuals is None else residuals[rows])
        start += count


@pytest.fixture
def scores():
    return torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_groups_go_to_their_rows_and_examples_to_their_columns(scores):
    answer, residuals = Answer(context(Alone()), 7, None), torch.rand(7)
    fill(answer, scores, torch.arange(5), residuals)
    fields, found = answer.take(several=True)
    assert fields["train_indices"].tolist() == [0, 2, 5, 7, 9]
    torch.testing.assert_close(fields["scores"], 0.5 * scores[:, [3, 1, 0, 4, 2]], rtol=0, atol=0)
    assert fields["query_indices"].tolist() == list(range(10, 17))
    assert fields["query_dataloaders"].tolist() == [n % 2 for n in range(10, 17)]
    assert torch.equal(found, residuals)
    assert "query_dataloaders" not in answer.take(several=False)[0]


def test_both_ends_of_groups_are_those_of_all(scores):
    answer = Answer(context(Alone()), 7, 2)
    fill(answer, scores, torch.arange(5))
    fields, residuals = answer.take(several=False)
    assert residuals is None
    best = scores.topk(2, dim=1)
    torch.testing.assert_close(fields["top_scores"], 0.5 * best.values)
    assert torch.equal(fields["top_indices"], ORDER[best.indices])
    worst = scores.topk(2, dim=1, largest=False)
    torch.testing.assert_close(fields["bottom_scores"], 0.5 * worst.values)
    assert torch.equal(fields["bottom_indices"], ORDER[worst.indices])


def test_processes_add_their_columns(scores):
    runner, mine, theirs = Pair(), torch.tensor([0, 2, 3]), torch.tensor([1, 4])
    answer = Answer(context(runner), 7, None)
    other = torch.zeros(7, 5, dtype=torch.float64)
    other[:, [1, 3]] = 0.5 * scores[:, theirs]  # indices 2 and 7
    runner.others = list(torch.split(other, GROUPS))
    fill(answer, scores, mine)
    assert not runner.others
    torch.testing.assert_close(answer.take(several=False)[0]["scores"], 0.5 * scores[:, [3, 1, 0, 4, 2]])


def test_scores_of_so_many_examples_fit_into_their_share_of_the_budget():
    answer = Answer(context(Alone()), 7, None)
    answer.begin(3)
    assert answer.count_examples() == 2
    answer.begin(4)
    assert answer.count_examples() == 1
