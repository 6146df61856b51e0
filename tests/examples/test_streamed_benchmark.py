"""The benchmark of factors in files runs at a tiny size, and both ways give the same scores."""

import argparse

import pytest
from benchmarks import load_benchmark


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_runs():
    bench, given = load_benchmark("streamed"), {"width": 16, "depth": 3, "examples": 40, "budget": 0.004}
    held, groups = (bench.measure(argparse.Namespace(**given, one=way)) for way in ("held", "groups"))
    assert groups["sum"] == pytest.approx(held["sum"], rel=1e-4)
    assert min(held["epochs"], groups["epochs"]) > 0
