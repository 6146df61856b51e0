"""The benchmark of ``auto`` in little memory runs as a whole, and its figures are those of its answers."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import large_auto

    yield large_auto
    sys.modules.pop("large_auto", None)


@pytest.mark.slow
def test_every_way_of_asking_has_a_row(bench, tmp_path, capsys):
    path = tmp_path / "rows.json"
    rows = bench.main(["resnet", "--tiny", "--epochs", "1", "--budgets", "1", "3", "--json", str(path)])
    assert [(row.method, row.budget_mib) for row in rows] == [
        ("identity", None), ("ekfac", None), ("auto", 1.0), ("auto", 3.0),
    ]  # fmt: skip
    assert json.loads(path.read_text())[2]["directions"] == rows[2].directions
    small, large = rows[2:]
    assert 1 <= small.directions <= large.directions <= 24
    assert small.rank is not None
    assert 0 < small.residual <= small.largest_residual
    for row in rows:
        assert -1 <= row.correlation <= 1
        assert row.epochs > 0
        assert row.passes >= 2
    assert small.correlation > rows[1].correlation
    assert capsys.readouterr().out.count("resnet") > 4
