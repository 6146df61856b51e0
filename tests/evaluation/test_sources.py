import numpy as np
import pytest
import source_models
import torch

from lightning_influence.evaluation.fingerprints import content, describe, digest, versions


def mark():
    return digest(describe(source_models.make))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WIDTH", 4),  # named by a function that a method of the base class calls
        ("TABLE", {"rate": [0.1, 0.3]}),  # named by a property
        ("helper", lambda: 3),
    ],
)
def test_what_a_factory_names_several_steps_away_counts(monkeypatch, name, value):
    before = mark()
    assert before == mark()
    monkeypatch.setattr(source_models, name, value)
    assert mark() != before


def test_defaults_closures_and_partials_count(monkeypatch):
    before = mark()
    monkeypatch.setattr(source_models.make, "__defaults__", (False,))
    assert mark() != before

    def closed(number):
        return lambda: number

    assert describe(closed(1)) != describe(closed(2))
    assert describe(source_models.partial) != describe(source_models.make)


def test_recursion_ends_and_libraries_count_by_name():
    assert describe(source_models.recursive)
    assert describe(torch.nn.Linear) == ["torch.nn.modules.linear.Linear"]


def test_versions_name_packages():
    found, unknown = versions(["torch", "no-such-package"])
    # Of the build, "+cu130" say, a package's metadata need not speak.
    assert found.partition("+")[0] == f"torch {torch.__version__}".partition("+")[0]
    assert unknown == "no-such-package unknown"


def test_content_is_by_value_type_and_place():
    values = [
        torch.zeros(2),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(1, 2),
        np.zeros(2),
        [0.0, 0.0],
        [0, 0],
        {"a": 0},
        {"b": 0},
        "0",
        b"0",
        None,
        torch.tensor(float("nan")),
        torch.zeros(2, dtype=torch.bfloat16),
    ]
    assert len({content(value) for value in values}) == len(values)
    assert content((1, {"x": torch.arange(4)[::2]})) == content([1, {"x": torch.tensor([0, 2])}])


def test_content_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"holds a object, whose content cannot be hashed.*Give `data_key=`"):
        content({"x": object()})
