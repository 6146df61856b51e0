"""Files of results with sound checksums and unsound content: one error, which names file and field."""

import re

import pytest
import torch
from result_examples import full

from lightning_influence.results.attributions import Attributions
from lightning_influence.support.errors import CorruptFileError
from lightning_influence.support.storage import load_tensors, save_tensors


@pytest.fixture
def path(tmp_path):
    return full().save(tmp_path / "result")


def change(path, diagnostics=None, **tensors):
    """Write the file again, with sound checksums; a tensor of None is left out."""
    old, metadata = load_tensors(path)
    kept = {name: tensor for name, tensor in {**old, **tensors}.items() if tensor is not None}
    save_tensors(path, kept, {**metadata, "diagnostics": {**metadata["diagnostics"], **(diagnostics or {})}})


@pytest.mark.parametrize(
    ("diagnostics", "tensors", "message"),
    [
        ({"method": 3}, {}, "diagnostics.method is 3; accepted is a text"),
        ({"seconds": "long"}, {}, "diagnostics.seconds is 'long'; accepted is a number"),
        ({"checkpoint": []}, {}, "diagnostics.checkpoint is []; accepted is a text or nothing"),
        ({"damping": [1.0]}, {}, "diagnostics.damping is [1.0]; accepted is a table of names and values"),
        ({"damping": {"a": None}}, {}, "diagnostics.damping['a'] is None; accepted is a number"),
        ({"layers": {"a": 1.5}}, {}, "diagnostics.layers['a'] is 1.5; accepted is an integer"),
        ({"warnings": "one"}, {}, "diagnostics.warnings is 'one'; accepted is a list"),
        ({"warnings": [1]}, {}, "diagnostics.warnings[0] is 1; accepted is a text"),
        ({"passes": [{"name": "a"}]}, {}, "accepted is a table with name, seconds, examples"),
        ({"passes": [{"name": "a", "seconds": 1, "examples": "x"}]}, {}, "passes[0].examples is 'x'"),
        ({"foreign": 1}, {}, "diagnostics.foreign is unknown; accepted are method, measurement"),
        ({}, {"scores": None}, "give either scores, or top and bottom"),
        ({}, {"query_indices": None}, "attributions.query_indices is missing"),
        ({}, {"foreign": torch.ones(1)}, "attributions.foreign is unknown"),
        ({}, {"diagnostics.foreign": torch.ones(1)}, "diagnostics.foreign is a tensor"),
        ({}, {"diagnostics.residuals": torch.ones(3).long()}, "diagnostics.residuals are torch.int64"),
        ({}, {"scores": torch.ones(3, 8).to(torch.float8_e4m3fn)}, "scores must be floating-point, got"),
        ({}, {"scores": torch.ones(3, 8).long()}, "scores must be floating-point, got torch.int64"),
        ({}, {"scores": torch.full((3, 8), float("nan"))}, "24 of 24 scores are NaN or infinite"),
        ({}, {"train_indices": torch.tensor(3)}, "train_indices must be (N,)"),
        ({}, {"query_indices": torch.tensor(3)}, "query_indices"),
        ({}, {"train_indices": torch.zeros(8).long()}, "train_indices must be (N,) and distinct"),
    ],
)
def test_the_field_and_what_was_got_are_named(path, diagnostics, tensors, message):
    change(path, diagnostics, **tensors)
    with pytest.raises(CorruptFileError, match=re.escape(message)) as caught:
        Attributions.load(path)
    assert f"{str(path)!r} does not hold sound attributions" in str(caught.value)
