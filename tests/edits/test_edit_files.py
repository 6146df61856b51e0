"""Files of edits with sound checksums and unsound content: one error, which names file and field."""

import re

import pytest
import torch
from saved_files import EDITED, edit

from lightning_influence.edits.parameter_edit import ParameterEdit
from lightning_influence.support.errors import CorruptFileError
from lightning_influence.support.storage import load_tensors, save_tensors

MODULE = EDITED


@pytest.fixture
def path(tmp_path):
    return edit().save(tmp_path / "edit")


@pytest.mark.parametrize(
    ("values", "tensors", "message"),
    [
        ({"shapes": 3}, {}, "shapes are 3; accepted is a table"),
        ({"shapes": {"weight": "32"}}, {}, "the shape of 'weight' is '32'; accepted is a list of integers"),
        ({"shapes": {"weight": [3, -2]}}, {}, "the shape of 'weight' is [3, -2]"),
        ({"shapes": {}}, {}, "'weight/after' belongs to no parameter"),
        ({"shapes": {"weight": [3, 2], "bias": [3]}}, {}, "there is no tensor 'bias/index'"),
        (
            {"shapes": {"weight": [2, 2]}},
            {},
            "parameter 'weight' has positions that are not distinct and from 0 to 3",
        ),
        ({"report": None}, {}, "report is None; accepted is a table"),
        ({"report": {}}, {}, "report.kind is missing"),
        (
            {},
            {"weight/index": torch.tensor([4, 4])},
            "has positions that are not distinct and from 0 to 5",
        ),
        (
            {},
            {"weight/index": torch.tensor([4, -1])},
            "has positions that are not distinct and from 0 to 5",
        ),
        (
            {},
            {"weight/index": torch.tensor([4.0, 1.0])},
            "positions of shape (2,) and torch.float32, not int64 (k,)",
        ),
        ({}, {"weight/index": torch.tensor(4)}, "positions of shape () and torch.int64, not int64 (k,)"),
        ({}, {"weight/after": torch.ones(1)}, "'after' of shape (1,) for 2 positions"),
        (
            {},
            {"weight/after": torch.ones(2).double()},
            "'before' of torch.float32 and 'after' of torch.float64",
        ),
        ({}, {"weight/after": torch.tensor([1.0, float("nan")])}, "NaN or infinity in 'after'"),
    ],
)
def test_the_field_and_what_was_got_are_named(path, values, tensors, message):
    old, metadata = load_tensors(path)
    save_tensors(path, {**old, **tensors}, {**metadata, **values})
    with pytest.raises(CorruptFileError, match=re.escape(message)) as caught:
        ParameterEdit.load(path, MODULE)
    assert f"{str(path)!r} does not hold sound parameter edit" in str(caught.value)


def test_an_edit_of_layers_without_parameters_can_be_shown(path):
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, {**metadata, "report": {**metadata["report"], "layers": {"empty": [0, 0]}}})
    assert "empty" in str(ParameterEdit.load(path, MODULE))
