"""Files of edits with sound checksums and unsound content: one error, which names file and field."""

import random
import re

import pytest
import torch
from mutations import mutate

from lightning_influence.edits.edit_report import EditReport, LossChange
from lightning_influence.edits.parameter_edit import Change, ParameterEdit
from lightning_influence.support.errors import CorruptFileError, EditMismatchError
from lightning_influence.support.storage import load_tensors, save_tensors

MODULE = torch.nn.Linear(2, 3)
REPORT = EditReport(
    kind="forget",
    method="gif",
    rule="top",
    ratio=0.5,
    layers={"": (2, 6)},
    step=[1.0],
    scale=0.1,
    damping=1e-3,
    residual=1e-6,
    solver_steps=7,
    norm=0.2,
    edited=LossChange(1, 0.1, 2.0, 1.5),
    kept=LossChange(9, 0.1, 0.11),
    notes=["a note"],
)


@pytest.fixture
def path(tmp_path):
    index = torch.tensor([4, 1])
    before = MODULE.weight.detach().flatten()[index]
    return ParameterEdit(MODULE, {"weight": Change(index, before, before + 1, (3, 2))}, REPORT).save(
        tmp_path / "edit"
    )


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


def test_whatever_the_content_there_is_one_error_or_a_sound_edit(path):
    (tensors, metadata), draw, messages = load_tensors(path), random.Random(0), []
    for _ in range(300):
        save_tensors(path, tensors, mutate(metadata, draw))
        try:
            found = ParameterEdit.load(path, MODULE)
        except CorruptFileError as error:
            messages.append(str(error))
        except EditMismatchError:
            continue  # of another parameter
        else:
            assert str(found)
            assert found.report.metrics()
    assert len(messages) > 150
    assert all(str(path) in message for message in messages)
