import doctest

import pytest
import torch
from benchmarks import load_benchmark

recipes = load_benchmark("recipes")
Recipe, draw_orders = recipes.Recipe, recipes.draw_orders


def test_the_example_of_the_docstring_holds():
    assert doctest.testmod(recipes) == (0, 3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.4] * 4), ("linear", [0.4, 0.3, 0.2, 0.1]), ("cosine", [0.4, 0.341421, 0.2, 0.058579])],
)
def test_schedules_decay_over_the_steps_of_the_run(schedule, expected):
    recipe = Recipe(0.4, epochs=2, batch_size=3, schedule=schedule)
    total = recipe.steps(5)
    assert total == 4
    assert [recipe.rate(k, total) for k in range(total)] == pytest.approx(expected, abs=1e-6)
    assert recipe.rate(total, total) == 0


def test_damping_is_weight_decay_plus_what_the_run_leaves_unresolved():
    recipe = Recipe(0.05, epochs=100, batch_size=32, momentum=0.9, weight_decay=1e-3)
    # 5100 steps of a mean rate of 0.05 (5101 / 5100) / 2, times 10 for the momentum.
    assert recipe.damping(1617) == pytest.approx(1e-3 + 0.1 / (0.05 * 5101 / 2), rel=1e-12)


def test_every_epoch_visits_every_kept_example_once_in_a_new_order():
    mask = torch.arange(30) % 3 > 0
    orders = draw_orders(mask, Recipe(0.1, epochs=4, batch_size=8), seed=0)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    for order in orders:
        assert torch.equal(order.sort().values, mask.nonzero().squeeze(1))


def test_subsets_visit_the_examples_they_share_in_the_same_order():
    recipe = Recipe(0.1, epochs=4, batch_size=8)
    everything = draw_orders(torch.ones(30, dtype=torch.bool), recipe, seed=3)
    for mask in (torch.arange(30) % 3 > 0, torch.arange(30) % 2 > 0):
        for full, order in zip(everything, draw_orders(mask, recipe, seed=3), strict=True):
            assert torch.equal(order, full[mask[full]])
    assert not torch.equal(everything[0], draw_orders(torch.ones(30, dtype=torch.bool), recipe, seed=4)[0])


def test_a_longer_run_begins_with_the_same_epochs():
    mask = torch.arange(30) % 3 > 0
    short, long = (draw_orders(mask, Recipe(0.1, epochs=n, batch_size=8), seed=0) for n in (2, 5))
    assert all(torch.equal(a, b) for a, b in zip(short, long[:2], strict=True))


def test_a_restricted_permutation_is_uniform_over_the_kept_examples():
    mask = torch.tensor([True, False, True, True, False])
    orders = torch.stack(draw_orders(mask, Recipe(0.1, epochs=6000, batch_size=1), seed=0))
    counts = torch.unique(orders, dim=0, return_counts=True)[1]
    # Each of the 6 orders is expected 1000 times with a standard deviation of 29; five of them allowed.
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 145


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, "Unknown schedule 'step'; choose one of"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"momentum": 1.0}, "0 <= momentum < 1 and weight_decay >= 0, got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"optimizer": "lion"}, r"Unknown optimizer 'lion'; choose one of"),
        ({"optimizer": "adam", "momentum": 0.9}, r"momentum is SGD's, got 0.9 with 'adam': set betas"),
        ({"betas": (0.9, 1.0)}, r"0 <= beta < 1 and eps > 0, got \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps > 0"),
    ],
)
def test_recipes_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"learning_rate": 0.1, "epochs": 1, "batch_size": 4} | changes)


def test_adams_damping_is_not_the_recipes_to_know():
    with pytest.raises(ValueError, match=r"second moments.*InfluenceCallback"):
        Recipe(0.1, epochs=1, batch_size=4, optimizer="adam").damping(10)
