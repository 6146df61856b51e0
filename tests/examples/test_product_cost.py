"""The benchmark of curvature products runs as a whole."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def test_each_number_of_vectors_has_a_cost(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import product_cost

    found = product_cost.main(["resnet", "--examples", "4", "--vectors", "1", "3"])
    sys.modules.pop("product_cost", None)
    assert found.keys() == {1, 3}
    assert min(found.values()) > 0
    assert "3 vectors" in capsys.readouterr().out
