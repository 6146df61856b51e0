"""Every rule against a plain loop over channels, at any ratio, on any layer shape; and rules of a user's."""

from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.edits import rules as base
from lightning_influence.edits.rules import (
    RuleScores,
    SelectionRule,
    ThresholdGradients,
    ThresholdOutputs,
    compute_gains,
    count_budget,
    find_rule,
    register_rule,
    rule_names,
    select,
)
from lightning_influence.results.rendering import render_plain

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5))
RATIOS = st.floats(0.01, 1.0)
OWN_RULES = [n for n in rule_names() if type(find_rule(n)).__module__ == base.__name__]
CHANNEL_RULES = sorted(set(OWN_RULES) - {"random", "gain"})


def draw_scores(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups, d_out, _ = shape
    channels = [torch.rand(groups * d_out, generator=generator) for _ in range(2)]
    gain = torch.rand(shape, generator=generator)
    return RuleScores({"a": shape}, {"a": channels[0]}, {"a": channels[1]}, {"a": gain})


def budget_by_hand(ratio, numel):
    """The nearest number to the ratio as it is written, by integers; of two the even one; at least one."""
    digits, exponent = f"{Decimal(repr(ratio)):e}".split("e")
    numerator = int(digits.replace(".", "")) * numel
    denominator = 10 ** (len(digits.partition(".")[2]) - int(exponent))
    whole, rest = divmod(numerator, denominator)
    up = 2 * rest > denominator or (2 * rest == denominator and whole % 2 == 1)
    return max(1, whole + up)


def rows_by_hand(order, shape, ratio):
    """Takes entries one by one: row after row, in each from the last column to the first."""
    groups, d_out, d_in = shape
    left = budget_by_hand(ratio, groups * d_out * d_in)
    chosen = set()
    for row in order:
        for column in reversed(range(d_in)):
            if left:
                chosen.add((row // d_out, row % d_out, column))
                left -= 1
    return chosen


def entries(mask):
    return {tuple(entry) for entry in mask.nonzero().tolist()}


def whole_order(name, scores):
    ranked = sorted(range(len(scores)), key=lambda c: scores[c], reverse=not name.startswith("lowest"))
    if name.startswith("threshold"):
        return [c for c in ranked if scores[c] >= 0.5 * max(scores)]
    return ranked


@given(SHAPES, RATIOS, st.sampled_from([n for n in CHANNEL_RULES if not n.startswith("exclusive")]))
@settings(max_examples=80, deadline=None)
def test_channel_rules_take_rows_in_order(shape, ratio, name):
    found = draw_scores(shape)
    scores = (found.outputs if name.endswith("outputs") else found.gradients)["a"].tolist()
    mask = select(find_rule(name), found, ratio).masks["a"]
    assert mask.shape == shape
    assert entries(mask) == rows_by_hand(whole_order(name, scores), shape, ratio)


@given(SHAPES, RATIOS, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_exclusive_takes_no_row_of_the_highest_while_there_are_others(shape, ratio, seed):
    found, width = draw_scores(shape), shape[-1]
    scores = found.gradients["a"].tolist()
    ranked = whole_order("highest", scores)
    count = budget_by_hand(ratio, shape[0] * shape[1] * width)
    highest = set(ranked[: -(-count // width)])
    chosen = select(find_rule("exclusive_gradients"), found, ratio, seed).masks["a"]
    rows = {g * shape[1] + o for g, o, _ in entries(chosen)}
    assert int(chosen.sum()) == count
    if rows & highest:  # only once every other row is taken as a whole
        others = set(range(len(scores))) - highest
        full = chosen.flatten(0, 1).all(1)
        assert all(full[row] for row in others)
        # And of the highest, the lowest come first.
        taken = [rank for rank, row in enumerate(ranked) if row in rows & highest]
        assert taken == list(range(taken[0], len(highest)))


@pytest.mark.parametrize(
    ("shape", "ratio", "count"),
    [
        ((3, 6, 5), 0.05, 4),  # 4.5, which floats find to be more in one order of multiplying than in another
        ((1, 2, 5), 0.35, 4),  # 3.5
        ((1, 3, 10), 0.1, 3),  # 3.0000000000000004 as floats
        ((1, 1, 4), 0.01, 1),
        ((2, 3, 4), 1, 24),
    ],
)
@pytest.mark.parametrize("name", ["random", "gain", "highest_outputs", "exclusive_gradients"])
def test_a_ratio_is_rounded_once_and_as_it_is_written(shape, ratio, count, name):
    assert count_budget(shape, ratio) == count
    assert select(find_rule(name), draw_scores(shape), ratio).count == count


@given(RATIOS, st.permutations([3, 6, 5, 2]))
@settings(max_examples=60, deadline=None)
def test_the_budget_depends_on_the_number_of_parameters_alone(ratio, sizes):
    a, b, c, d = sizes
    assert count_budget((a, b, c * d), ratio) == count_budget((6, 5, 6), ratio) == budget_by_hand(ratio, 180)


def test_exclusive_depends_on_the_seed_and_highest_does_not():
    found = draw_scores((1, 40, 3))
    masks = [select(find_rule("exclusive_outputs"), found, 0.1, seed).flat() for seed in range(4)]
    assert len({tuple(mask.tolist()) for mask in masks}) > 1
    highest = [select(find_rule("highest_outputs"), found, 0.1, seed).flat() for seed in range(2)]
    assert torch.equal(*highest)


@given(SHAPES, RATIOS, st.sampled_from(OWN_RULES), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_same_seed_same_selection_within_budget(shape, ratio, name, seed):
    found = draw_scores(shape)
    first, second = (select(find_rule(name), found, ratio, seed) for _ in range(2))
    assert torch.equal(first.flat(), second.flat())
    budget = budget_by_hand(ratio, first.numel)
    assert first.count <= budget if name.startswith("threshold") else first.count == budget
    assert first.count >= 1


def test_random_is_uniform_over_parameters():
    found = draw_scores((1, 4, 5))
    hits = torch.stack([select(find_rule("random"), found, 0.2, seed).flat() for seed in range(600)])
    frequency = hits.double().mean(0)
    assert (frequency - 0.2).abs().max() < 0.07  # four standard deviations of 600 draws


@pytest.mark.parametrize("ridge", [0.0, 2.5])
def test_gain_takes_the_parameters_that_lower_the_residual_most(ridge):
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    H, g = half + half.T, torch.randn(12, generator=generator, dtype=torch.float64)
    drops = []
    for i in range(12):
        # ||H_i x - g||^2 + r x^2 is a plain least-squares problem with one more row.
        column, target = torch.cat([H[:, i], H.new_tensor([ridge**0.5])]), torch.cat([g, g.new_zeros(1)])
        x = torch.linalg.lstsq(column[:, None], target[:, None]).solution
        drops.append(float(g @ g - (column * x.item() - target).square().sum()))
    got = compute_gains(H @ g, (H @ H).diagonal(), ridge)
    torch.testing.assert_close(got, torch.tensor(drops, dtype=torch.float64))
    shape = (1, 3, 4)
    chosen = select(find_rule("gain"), RuleScores({"a": shape}, gain={"a": got.view(shape)}), 0.25).flat()
    assert set(chosen.nonzero().flatten().tolist()) == set(got.topk(3).indices.tolist())


def test_a_parameter_without_curvature_has_no_gain():
    assert compute_gains(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", [ThresholdOutputs, ThresholdGradients])
def test_threshold_level(kind):
    scores = torch.tensor([0.1, 1.0, 0.8, 0.85])
    found = RuleScores({"a": (1, 4, 2)}, outputs={"a": scores}, gradients={"a": scores})
    rows = select(kind(level=0.8), found, 1.0).masks["a"][0].all(1)
    assert rows.tolist() == [False, True, True, True]
    rows = select(kind(level=0.85), found, 0.25).masks["a"][0].all(1)
    assert rows.tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match=r"level=0.*\(0, 1\]"):
        kind(level=0.0)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.0001, float("nan"), "0.1", True, None])
def test_ratio_outside(ratio):
    with pytest.raises(ValueError, match=r"Got ratio=.*\(0, 1\]"):
        select(find_rule("random"), draw_scores((1, 2, 2)), ratio)


@pytest.mark.parametrize("name", ["nonsense", 3, None])
def test_unknown_rule_lists_the_known(name):
    with pytest.raises(ValueError, match=r"accepted are .*'gain'.*'random'"):
        find_rule(name)


def test_a_rule_of_ones_own():
    try:

        @register_rule("first")
        class First(SelectionRule):
            def mask(self, scores, shape, ratio, generator):
                chosen = torch.zeros(shape, dtype=torch.bool)
                chosen[0, 0, 0] = True
                return chosen

        selection = select(find_rule("first"), RuleScores({"a": (1, 2, 2), "b": (1, 1, 1)}), 0.5)
        assert selection.flat().tolist() == [True, False, False, False, True]
        assert find_rule(First()).name == selection.rule == "first"
    finally:
        base._RULES.pop("first", None)


def test_a_selection_shows_itself():
    selection = select(find_rule("highest_outputs"), draw_scores((1, 4, 5)), 0.5)
    text = render_plain(selection)
    assert "10 of 20 parameters" in text
    assert "2 of 4" in text
    assert "50.0%" in text
    assert "10 of 20" in repr(selection)


# Rules of the user's own: what they have to be and to return

SHAPE = (1, 4, 5)
GAIN = RuleScores({"a": SHAPE}, gain={"a": torch.arange(20.0).view(SHAPE)})


def returning(value):
    class Fixed(SelectionRule):
        name = "fixed"

        def mask(self, scores, shape, ratio, generator):
            return value(shape) if callable(value) else value

    return Fixed()


def first(count):
    return lambda shape: (torch.arange(20) < count).view(shape)


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (torch.rand, TypeError, r"returned torch.float32; .* boolean tensor of shape \(1, 4, 5\)"),
        (lambda shape: torch.ones(shape, dtype=torch.int64), TypeError, "returned torch.int64"),
        (lambda shape: np.ones(shape), TypeError, "returned torch.float64"),
        (None, TypeError, "returned NoneType"),
        ([True], TypeError, "returned list"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"mask of shape \(3,\); .* \(1, 4, 5\)"),
        (torch.ones(4, 5, dtype=torch.bool), ValueError, r"mask of shape \(4, 5\)"),
        (np.ones(3, dtype=bool), ValueError, r"mask of shape \(3,\)"),
        (first(20), ValueError, r"'fixed' selects 20 of the 20 parameters of layer 'a'; ratio=0.5 allows 10"),
        (first(11), ValueError, "selects 11 of the 20 .*larger ratio="),
        (first(0), ValueError, "selects no parameter in any layer"),
    ],
)
def test_masks_are_checked(value, error, says):
    with pytest.raises(error, match=says):
        select(returning(value), GAIN, 0.5)


def test_masks_that_serve():
    assert select(returning(first(10)), GAIN, 0.5).count == 10
    assert select(returning(first(20)), GAIN, 1.0).count == 20
    assert select(returning(lambda shape: first(10)(shape).numpy()), GAIN, 0.5).count == 10
    # A share that is no whole number may be rounded up, and one parameter is always allowed.
    assert select(returning(first(3)), GAIN, 0.11).count == 3
    assert select(returning(first(1)), GAIN, 1e-9).count == 1


def test_a_layer_may_stay_as_it_is():
    class Second(SelectionRule):
        def mask(self, scores, shape, ratio, generator):
            return torch.full(shape, shape == (1, 1, 2))

    found = select(Second(), RuleScores({"a": SHAPE, "b": (1, 1, 2)}), 1.0)
    assert found.flat().nonzero().flatten().tolist() == [20, 21]


def test_an_unknown_source():
    class Misspelt(SelectionRule):
        source = "gains"

        def mask(self, scores, shape, ratio, generator):
            raise AssertionError

    says = r"has source='gains'; accepted are 'outputs', 'gradients', 'gain' or None"
    with pytest.raises(ValueError, match=says):
        register_rule("misspelt")(Misspelt)
    for use in (find_rule, lambda rule: select(rule, GAIN, 0.5)):
        with pytest.raises(ValueError, match=says):
            use(Misspelt())
    assert "misspelt" not in rule_names()


def test_registering_without_a_name():
    with pytest.raises(TypeError, match=r"register_rule\(<class .*@register_rule\('my_rule'\)"):

        @register_rule
        class Nameless(SelectionRule):
            def mask(self, scores, shape, ratio, generator):
                raise AssertionError


def test_registering_what_is_no_rule():
    before = rule_names()
    for thing in (lambda scores, shape, ratio, generator: None, dict, returning(first(1))):
        with pytest.raises(TypeError, match="to register as rule 'mine'; accepted is a subclass"):
            register_rule("mine")(thing)
    assert rule_names() == before
