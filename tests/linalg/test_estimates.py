"""Random vectors, and numbers estimated with them: right on average, and within their errors."""

from __future__ import annotations

import math

import pytest
import torch
from known_spectra import DOUBLE, P, covered, decaying, indefinite, matrix

from lightning_influence.linalg.estimates import (
    Estimate,
    add_traces_outside,
    average,
    divide,
    draw_vectors,
    estimate_traces,
)
from lightning_influence.linalg.lanczos import block_lanczos


def test_random_vectors_have_unit_covariance_and_follow_the_seed():
    for kind in ("signs", "normal"):
        z = draw_vectors(20000, 5, 3, kind=kind, dtype=DOUBLE)
        assert torch.allclose(z.T @ z / 20000, torch.eye(5, dtype=DOUBLE), atol=0.05)
        assert torch.equal(z, draw_vectors(20000, 5, 3, kind=kind, dtype=DOUBLE))
        assert not torch.equal(z, draw_vectors(20000, 5, 4, kind=kind, dtype=DOUBLE))
    assert set(draw_vectors(9, 9, 0).unique().tolist()) == {-1.0, 1.0}


def test_mean_and_ratio():
    assert average(torch.tensor([1.0, 2.0, 3.0])) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)))
    assert average(torch.tensor([1.0])).error == math.inf
    assert divide(Estimate(6.0, 0.6), Estimate(2.0, 0.1)) == Estimate(3.0, pytest.approx(0.45))
    assert divide(Estimate(6.0, None), Estimate(2.0, 0.1)) == Estimate(3.0, None)
    assert math.isnan(divide(Estimate(1.0, 0.0), Estimate(0.0, 0.0)).value)
    assert str(Estimate(1.2345, 0.012)) == "1.234 +- 0.012"
    assert str(Estimate(2.0, None)) == "2"


@pytest.mark.parametrize("values", [decaying(), indefinite()], ids=["positive", "indefinite"])
@pytest.mark.parametrize("way", ["plain", "outside"])
def test_traces_are_unbiased_and_within_their_standard_errors(way, values):
    H, product = matrix(values)
    runs = []
    for seed in range(60):
        probes = draw_vectors(12, P, seed, dtype=DOUBLE)
        if way == "plain":
            runs.append(estimate_traces(product, probes))
        else:
            ritz = block_lanczos(product, draw_vectors(6, P, seed + 100, kind="normal", dtype=DOUBLE), 2)
            runs.append(add_traces_outside(product, ritz.basis, ritz.inside, probes))
    for truth, name in ((float(H.trace()), "trace"), (float((H @ H).trace()), "square")):
        found = [getattr(run, name) for run in runs]
        mean = average(torch.tensor([e.value for e in found], dtype=DOUBLE))
        assert abs(mean.value - truth) < 4 * mean.error  # 60 runs, fixed seeds
        # Normal errors would give .95; a handful of skewed samples a run gives somewhat less.
        assert covered(found, truth, 2) > 0.75
        assert covered(found, truth, 4) > 0.9


def test_a_known_subspace_is_better_than_more_probes():
    H, product = matrix(decaying())
    truth = float(H.trace())

    def error(estimates):
        return sum((e.value - truth) ** 2 for e in estimates) ** 0.5

    plain, better = [], []
    for seed in range(30):
        plain.append(estimate_traces(product, draw_vectors(24, P, seed, dtype=DOUBLE)).trace)
        ritz = block_lanczos(product, draw_vectors(8, P, seed + 100, kind="normal", dtype=DOUBLE), 2)
        probes = draw_vectors(8, P, seed, dtype=DOUBLE)
        better.append(add_traces_outside(product, ritz.basis, ritz.inside, probes).trace)
    assert error(better) < 0.4 * error(plain)


@pytest.mark.parametrize("rank", [0, 3])
def test_traces_are_exact_on_low_rank(rank):
    values = torch.zeros(P, dtype=DOUBLE)
    values[:rank] = torch.tensor([3.0, -2.0, 0.5])[:rank]
    H, product = matrix(values)
    ritz = block_lanczos(product, draw_vectors(5, P, 0, kind="normal", dtype=DOUBLE), 3)
    found = add_traces_outside(product, ritz.basis, ritz.inside, draw_vectors(5, P, 1, dtype=DOUBLE))
    assert found.trace.value == pytest.approx(float(H.trace()), abs=1e-10)
    assert found.square.value == pytest.approx(float((H @ H).trace()), abs=1e-10)
