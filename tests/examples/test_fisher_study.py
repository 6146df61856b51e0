"""The study of what factors are made of runs, and tells the kinds apart."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The benchmark modules, with an empty cache; forgotten afterwards."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fisher
    import tasks
    import truth

    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    yield fisher, tasks, truth
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(BENCHMARKS) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.mark.slow
def test_every_kind_has_a_row(bench):
    fisher, tasks, truth = bench
    full = tasks.digits_mlp()
    train, queries = full.train.head(96), full.queries.head(8)
    task = replace(full, train=train, queries=queries, recipe=replace(full.recipe, epochs=2))
    masks = torch.rand(12, 96, generator=torch.Generator().manual_seed(0)) < 0.5
    found = truth.Truth(masks, torch.randn(12, 1, 8, generator=torch.Generator().manual_seed(1)))
    table = fisher.table(task, found, seeds=2)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["a pass"] * 4 + ["the fit"] * 3
    assert columns[1] == ["mixed", "sampled", "exact", "empirical", "mixed", "sampled", "empirical"]
    kfac, ekfac = columns[2:]
    assert len(set(kfac)) == len(set(ekfac)) == 7
    assert all(
        " to " in cell for cell, kind in zip(ekfac, columns[1], strict=True) if kind in {"mixed", "sampled"}
    )
