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


@pytest.mark.grid
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("batches", [False, True])
def test_auto_answers_groups_as_it_answers_all(steps, batches):
    torch.manual_seed(0)
    module = InfluenceModule(Net().double())
    data = [[x.double() if x.is_floating_point() else x for x in batch] for batch in train(shuffle=False)]
    asked_for = [[x.double() if x.is_floating_point() else x for x in batch] for batch in queries()]
    options = {"method": "auto", "damping": 0.1, "low_rank_tolerance": 0.0, "tolerance": 1e-9 if steps else 9}
    options["max_steps"] = 30 * steps
    given = asked_for if batches else loader_of(asked_for)
    whole = module.scores(data, given, **options)
    assert names(whole).count("scores") == 1
    parameters, held = sum(whole.diagnostics.layers.values()), module.state.coarse
    assert held is not None
    # What the coarse space holds, and (with steps) its damped product, leaves memory for two queries.
    room = held.nbytes + (held.directions.nbytes if steps else 0) + (4 if steps else 2) * 2 * 8 * parameters
    parts = module.scores(data, given, memory_budget=room, **options)
    assert len(whole.query_indices) == 4
    assert names(parts).count("scores") == (3 if batches else 2)  # a batch of three is cut after it is read
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-6, atol=1e-10)
    assert parts.query_indices.tolist() == whole.query_indices.tolist()
    assert parts.diagnostics.residuals.shape == whole.diagnostics.residuals.shape


def test_queries_are_read_in_groups_from_every_loader():
    torch.manual_seed(0)
    module = InfluenceModule(Net())
    loaders = [queries(), queries()]
    options = {"method": "ekfac", "damping": 0.1, "low_rank_tolerance": 0.0}
    whole = module.scores(train(shuffle=False), loaders, **options)
    parts = module.scores(train(shuffle=False), loaders, memory_budget=1, **options)
    count = len(whole.query_indices)
    assert names(whole).count("query gradients") == 1
    assert names(parts).count("query gradients") == count // 2  # no pass makes a batch of one
    torch.testing.assert_close(parts.scores, whole.scores)
    assert parts.query_indices.tolist() == whole.query_indices.tolist()
    assert parts.query_dataloaders.tolist() == whole.query_dataloaders.tolist()


def loader_of(batches):
    tensors = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), 3)
