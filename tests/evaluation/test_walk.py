"""What code is made of besides its text: values it is bound to, states of objects, what it cannot tell."""

import functools
import importlib
import logging
import re
import threading
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from lightning_influence.evaluation.fingerprints import beyond_source, describe
from lightning_influence.evaluation.losses import cross_entropy

SETTINGS = SimpleNamespace(rate=0.1)


class Config:
    rate = 0.1

    def __init__(self, width):
        self.width = width

    def __call__(self):
        return self.width

    def make(self):
        return self.width


class Slotted:
    __slots__ = ("width",)

    def __init__(self, width):
        self.width = width


@dataclass
class Settings:
    width: int
    names: list = field(default_factory=list)


class Kind(Enum):
    SMALL = 1
    LARGE = 2


def rate():
    return SETTINGS.rate


@functools.cache
def cached():
    return rate()


def scaled(factor):
    def decorate(function):
        @functools.wraps(function)
        def wrapper():
            return factor * function()

        return wrapper

    return decorate


def plain(outputs, targets):
    return cross_entropy(outputs, targets) + nn.functional.relu(torch.zeros(len(targets)))


def closing_over(value):
    return lambda: value


def linear(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(2, 2)


LAMBDAS = [lambda x: x.sum(1), lambda x: x.mean(1)]  # on one line
PAIRS = {
    "closure": closing_over,
    "partial": lambda value: functools.partial(plain, targets=value),
    "default": lambda value: lambda x=value: x,
    "decorator": lambda value: scaled(value)(rate),
    "lambda": lambda value: LAMBDAS[value],
    "function in C": lambda value: closing_over((torch.tanh, torch.relu)[value]),
    "callable object": Config,
    "bound method": lambda value: Config(value).make,
    "slots": lambda value: closing_over(Slotted(value)),
    "dataclass": lambda value: closing_over(Settings(value)),
    "nested": lambda value: closing_over(Settings(0, [{"key": Config(value)}])),
    "namespace": lambda value: closing_over(SimpleNamespace(width=value)),
    "enum": lambda value: closing_over((Kind.SMALL, Kind.LARGE)[value]),
    "module": lambda value: closing_over(linear(value)),
    "data set": lambda value: closing_over(TensorDataset(torch.tensor([value]))),
    "array": lambda value: closing_over(np.array([value])),
    "array of objects": lambda value: closing_over(np.array([value, "a"], dtype=object)),
    "generator": lambda value: closing_over(torch.Generator().manual_seed(value)),
    "which is meant twice": lambda value: closing_over((pair := [[1], [2]]) and [*pair, pair[value]]),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("words", [describe, beyond_source])
def test_values_count_and_nothing_else_does(name, words):
    make = PAIRS[name]
    assert words(make(0)) == words(make(0))
    assert words(make(0)) != words(make(1))


def test_attributes_of_global_objects_and_classes_count(monkeypatch):
    functions = [rate, cached, lambda: Config, scaled(1)(rate)]
    before = list(map(describe, functions))
    monkeypatch.setattr(SETTINGS, "rate", 0.2)
    monkeypatch.setattr(Config, "rate", 0.2)
    for old, function in zip(before, functions, strict=True):
        assert describe(function) != old


def test_attributes_of_the_users_modules_count_where_a_function_names_them(monkeypatch, tmp_path):
    path = tmp_path / "settings_of_test_walk.py"
    path.write_text("RATE, OTHER = 0.1, 1")
    monkeypatch.syspath_prepend(tmp_path)
    settings = importlib.import_module(path.stem)
    monkeypatch.setitem(globals(), "settings", settings)
    before = describe(names_rate)
    settings.OTHER = 2
    assert describe(names_rate) == before
    settings.RATE = 0.2
    assert describe(names_rate) != before


def names_rate():
    return settings.RATE  # noqa: F821


def test_a_plain_function_adds_nothing_to_its_source():
    for function in (plain, cross_entropy, nn.Linear, nn.functional.cross_entropy):
        assert beyond_source(function) == []


def test_what_every_session_has_of_its_own_does_not_count():
    def things():
        return logging.getLogger(__name__), threading.Lock(), Console(), Path("a"), re.compile("a"), {"a", 1}

    assert describe(closing_over(things())) == describe(closing_over(things()))


def test_what_cannot_be_described_is_refused_by_its_name():
    holder = Config({"key": [iter(x for x in "ab")]})
    with pytest.raises(
        TypeError,
        match=r"`holder > width > key` is a builtins\.generator, whose state cannot be read .*Make it",
    ):
        describe(lambda: holder)
    with pytest.raises(TypeError, match=r"Got a builtins\.generator"):
        describe(iter(x for x in "ab"))


def test_objects_that_hold_themselves_end():
    loop = Config(None)
    loop.width = [loop]
    assert describe(closing_over(loop))
