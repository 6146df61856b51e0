"""The study of block Krylov runs as a whole, and its answers are those of ``auto``."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The study, with an empty cache; forgotten afterwards."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import krylov

    yield krylov
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(BENCHMARKS) in sys.modules[name].__file__:
            del sys.modules[name]


def test_small_run_prints_every_setting(study, capsys):
    study.main(["--small", "--tasks", "diabetes", "--groups", "5", "0"])
    out = capsys.readouterr().out
    assert "diabetes: 12 queries" in out
    assert sum("│ all" in line for line in out.splitlines()) == 1 + 3 + 5  # 3 steps in float32 only once
    assert sum("│ 5 " in line for line in out.splitlines()) == 3


@pytest.mark.slow
def test_steps_converge_to_the_dense_solution_in_any_groups(study):
    problem = study.Problem(study.LADDER["diabetes"](), small=True)
    rows = [problem.solve(30, group, "float64") for group in (0, 5)]
    for row in rows:
        # The coarse space and its products were made in float32, whatever the precision of the steps.
        assert row.residuals.max() < 1e-6
        assert row.orthogonality < 1e-5
    torch.testing.assert_close(rows[0].scores, rows[1].scores, rtol=1e-5, atol=1e-7)
    first, third = (problem.solve(steps, 0).residuals.median() for steps in (1, 3))
    assert third < first
