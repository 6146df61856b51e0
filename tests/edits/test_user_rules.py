"""What rules of the user's own have to be and to return."""

import numpy as np
import pytest
import torch

from lightning_influence.edits import rules as base
from lightning_influence.edits.rules import RuleScores, SelectionRule, find_rule, register_rule, select

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
    assert "misspelt" not in base.rule_names()


def test_registering_without_a_name():
    with pytest.raises(TypeError, match=r"register_rule\(<class .*@register_rule\('my_rule'\)"):

        @register_rule
        class Nameless(SelectionRule):
            def mask(self, scores, shape, ratio, generator):
                raise AssertionError


def test_registering_what_is_no_rule():
    before = base.rule_names()
    for thing in (lambda scores, shape, ratio, generator: None, dict, returning(first(1))):
        with pytest.raises(TypeError, match="to register as rule 'mine'; accepted is a subclass"):
            register_rule("mine")(thing)
    assert base.rule_names() == before
