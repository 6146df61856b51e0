"""The comparison of factors from a fit with refitted ones runs on a task that needs no published models."""

import io
from dataclasses import replace

import pytest
import torch
from benchmarks import load_benchmark
from rich.console import Console

pytestmark = pytest.mark.slow


def test_a_case_gives_a_row():
    benchmark = load_benchmark("fit_factors")
    case = benchmark.CASES["digits_mlp"]()
    case = replace(case, train=case.train.head(96), queries=case.queries.head(5), epochs=2)
    result = benchmark.run(case, 1)
    assert result.steps == 2 * -(-96 // case.batch)
    assert result.batches >= 1
    assert result.examples >= min(case.batch, 96) > 0
    assert -1 <= result.rank <= 1
    assert 0 < result.norm < float("inf")
    # Refitted factors differ by their draws only.
    assert result.again[0] > 0.5
    written = io.StringIO()
    benchmark.render([result], Console(file=written))
    assert "digits_mlp" in written.getvalue()


def test_rank_correlation_is_spearmans():
    benchmark = load_benchmark("fit_factors")
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    assert benchmark.correlate(scores, scores**3) == pytest.approx(1.0)
    assert benchmark.correlate(scores, -scores) == pytest.approx(-1.0)
    other = torch.tensor([[1.0, 3.0, 2.0, 4.0], [4.0, 3.0, 1.0, 2.0]])
    assert benchmark.correlate(scores, other) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)


def test_published_cases_are_named():
    benchmark = load_benchmark("fit_factors")
    assert set(benchmark.PUBLISHED) == {"bert", "llama", "vit", "convnext"}
