from fractions import Fraction

import numpy
import pytest

from lightning_influence.api.engine import Question
from lightning_influence.edits.request import EditOptions
from lightning_influence.methods.options import Options
from lightning_influence.methods.spectrum import SpectrumSettings
from lightning_influence.support.arguments import parse_options, to_plain_number


@pytest.mark.parametrize(
    ("kind", "given", "near"),
    [
        (Options, "dampning", "damping"),
        (EditOptions, "linearizations", "linearisations"),
        (SpectrumSettings, "probe", "probes"),
    ],
)
def test_misspelt_settings_are_named_with_the_nearest(kind, given, near):
    with pytest.raises(TypeError, match=f"unknown option '{given}'.*mean '{near}'.*Accepted are .*seed"):
        parse_options(kind, {given: 1})


def test_names_that_resemble_nothing_have_no_hint():
    with pytest.raises(TypeError, match=r"unknown option 'zzz'\. Accepted are damping, "):
        parse_options(Options, {"zzz": 1})


def test_numbers_of_numpy_are_taken_as_numbers():
    options = parse_options(
        Options, {"seed": numpy.int64(3), "damping": numpy.float32(0.5), "fisher": "exact"}
    )
    assert options == Options(seed=3, damping=0.5, fisher="exact")
    assert type(options.seed) is int
    assert type(options.damping) is float
    assert parse_options(EditOptions, {"ratio": Fraction(1, 4)}).ratio == 0.25
    assert Question(top_k=numpy.int32(5)).top_k == 5


@pytest.mark.parametrize("value", [True, None, "auto", 1, 0.5])
def test_other_values_stay_as_they_are(value):
    assert to_plain_number(value) is value


def test_what_is_out_of_range_is_still_refused():
    with pytest.raises(ValueError, match="Got seed=-1"):
        parse_options(Options, {"seed": numpy.int64(-1)})
    with pytest.raises(ValueError, match="Got top_k=0"):
        Question(top_k=numpy.int64(0))
