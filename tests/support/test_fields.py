"""Stored values against annotated dataclasses: every kind of annotation, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import pytest
import torch
from torch import Tensor
from typing_extensions import NotRequired

from lightning_influence.support.fields import check_fields, read_tensor


class Part(TypedDict):
    name: str
    size: NotRequired[int]


@dataclass
class Inner:
    number: float


@dataclass
class Outer:
    text: str
    inner: Inner
    pairs: Mapping[str, tuple[int, int]]
    parts: Sequence[Part] = ()
    flags: list[bool] = field(default_factory=list)
    maybe: float | None = None
    tensor: Tensor | None = None
    free: Any = None


SOUND = {"text": "a", "inner": {"number": 1}, "pairs": {"a": [1, 2]}}


def test_sound_values_are_returned():
    for more in (
        {},
        {"parts": [{"name": "a"}, {"name": "b", "size": 2}], "flags": [True]},
        {"maybe": 1.5, "tensor": torch.ones(1), "free": object()},
        {"inner": Inner(2.0)},
    ):
        assert check_fields(Outer, {**SOUND, **more}, "it") == {**SOUND, **more}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": 1}, r"it\.text is 1; accepted is a text"),
        ({"inner": 1}, r"it\.inner is 1; accepted is a table"),
        ({"inner": {}}, r"it\.inner\.number is missing"),
        ({"inner": {"number": True}}, r"it\.inner\.number is True; accepted is a number"),
        ({"pairs": {"a": [1]}}, r"it\.pairs\['a'\] is \[1\]; accepted is a list of 2"),
        ({"pairs": {"a": [1, "x"]}}, r"it\.pairs\['a'\]\[1\] is 'x'; accepted is an integer"),
        ({"parts": [{}]}, r"it\.parts\[0\] is \{\}; accepted is a table with name"),
        ({"parts": [{"name": "a", "size": "x"}]}, r"it\.parts\[0\]\.size is 'x'; accepted is an integer"),
        ({"flags": [0]}, r"it\.flags\[0\] is 0; accepted is true or false"),
        ({"maybe": "x" * 99}, r"it\.maybe is 'x{39}\.\.\.; accepted is a number or nothing"),
        ({"tensor": 1}, r"it\.tensor is 1; accepted is a tensor or nothing"),
        ({"more": 1}, r"it\.more is unknown; accepted are text, inner, pairs"),
    ],
)
def test_others_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        check_fields(Outer, {**SOUND, **changes}, "it")


def test_a_table_is_asked_for():
    with pytest.raises(ValueError, match="it is None; accepted is a table"):
        check_fields(Outer, None, "it")


def test_tensors_are_read_by_name_and_shape():
    tensors = {"a": torch.ones(2, 3)}
    assert read_tensor(tensors, "a", shape=(2, 3), ndim=2) is tensors["a"]
    with pytest.raises(ValueError, match=r"there is no tensor 'b', only \['a'\]"):
        read_tensor(tensors, "b")
    with pytest.raises(ValueError, match=r"a has shape \(2, 3\); accepted are 1 dimensions"):
        read_tensor(tensors, "a", ndim=1)
    with pytest.raises(ValueError, match=r"a has shape \(2, 3\); accepted is \(3, 2\)"):
        read_tensor(tensors, "a", shape=(3, 2))
