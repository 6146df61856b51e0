"""Queries that do not fit into the memory budget together are answered in groups, as if they had."""

import pytest
import torch
from influence_models import Net, names, queries, train

from lightning_influence import InfluenceModule

pytestmark = pytest.mark.filterwarnings("ignore:.*logging interval")


def asked(method, **options):
    torch.manual_seed(0)
    options = {"damping": 0.1, "low_rank_tolerance": 0.0, **options}
    return InfluenceModule(Net()).scores(train(shuffle=False), queries(), method=method, **options)


@pytest.mark.parametrize("method", ["identity", "ekfac"])
def test_groups_of_queries_give_the_same_scores(method):
    whole = asked(method)
    parameters = sum(whole.diagnostics.layers.values())
    parts = asked(method, memory_budget=2 * 3 * 4 * parameters)  # three at a time
    count = len(whole.query_indices)
    assert names(parts).count("scores") == -(-count // 3) > names(whole).count("scores") == 1
    torch.testing.assert_close(parts.scores, whole.scores)
    assert parts.query_indices.tolist() == whole.query_indices.tolist()
    one_by_one = asked(method, memory_budget=1)
    assert names(one_by_one).count("scores") == count
    torch.testing.assert_close(one_by_one.scores, whole.scores)


def test_groups_of_queries_keep_both_ends():
    whole, parts = asked("ekfac", top_k=2), asked("ekfac", top_k=2, memory_budget=1)
    for name in ("top_scores", "top_indices", "bottom_scores", "bottom_indices"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
