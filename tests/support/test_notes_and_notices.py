"""Notes are kept for the certificate and said once: as a warning, or as information."""

import logging
import warnings

import pytest

from lightning_influence import InfluenceWarning
from lightning_influence.support.notes import Notes


@pytest.fixture
def told():
    """What Lightning's loggers are given."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_what_may_change_an_answer_is_a_warning(told):
    notes = Notes()
    with pytest.warns(InfluenceWarning, match="left out"):
        notes.add("left out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes.add("left out")
    assert notes.messages == ["left out"]
    assert "left out" not in told


def test_what_was_done_to_get_it_right_is_information(told):
    notes = Notes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes.inform("fitted in a pass")
        notes.inform("fitted in a pass")
    assert notes.messages == ["fitted in a pass"]
    assert told == ["fitted in a pass"]
