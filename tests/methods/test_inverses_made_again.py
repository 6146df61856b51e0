"""Inverses that exceed the memory budget are made of the factors where they are used, and answer alike."""

import pytest
import torch
from influence_cases import EXACTLY, Asked
from models import CASES

from lightning_influence.methods import closed_form

CLOSE = {"rtol": 1e-9, "atol": 1e-13}
NAMES = ["mlp_gelu", "tokens_weighted", "conv2d_reflect_groups"]


@pytest.fixture
def inverses(monkeypatch):
    """The inverses that are made of factors, with these."""
    made = []
    invert = closed_form.invert_blocks

    def watch(layout, factors, *arguments):
        made.append((invert(layout, factors, *arguments), factors))
        return made[-1][0]

    for module in ("closed_form", "auto", "iterative"):
        monkeypatch.setattr(f"lightning_influence.methods.{module}.invert_blocks", watch)
    return made


@pytest.mark.grid
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["kfac", "ekfac", "auto", "cg"])
def test_answers_are_the_same(inverses, name, method):
    options = {**EXACTLY, "method": method}
    if method in ("auto", "cg"):
        options |= {"tolerance": 1e-10, "max_steps": 80}
    asked = Asked(CASES[name])
    plain = asked.scores(**options)
    held = len(inverses)
    again = asked.scores(memory_budget=200, **options)
    close = {"rtol": 1e-6, "atol": 1e-10} if method in ("auto", "cg") else CLOSE
    torch.testing.assert_close(again.scores, plain.scores, **close)
    assert all(layer.unit is None for inverse, _ in inverses[:held] for layer in inverse.layers.values())
    later = [layer for inverse, _ in inverses[held:] for layer in inverse.layers.values()]
    assert later
    assert not any(layer.unit is None for layer in later)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_self_influence_is_the_same(method):
    asked = Asked(CASES["tokens_weighted"])
    options = {**EXACTLY, "method": method}
    plain, again = asked.self_influence(**options), asked.self_influence(memory_budget=200, **options)
    torch.testing.assert_close(again.scores, plain.scores, **CLOSE)


def test_nothing_is_held_beside_the_factors(inverses):
    Asked(CASES["mlp_gelu"]).scores(memory_budget=200, method="ekfac", **EXACTLY)
    inverse, factors = inverses[-1]
    for name, layer in inverse.layers.items():
        assert layer.moments.data_ptr() == factors.layers[name].squares.data_ptr()
        held = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        assert [tensor.data_ptr() for tensor in held] == [layer.moments.data_ptr()]
