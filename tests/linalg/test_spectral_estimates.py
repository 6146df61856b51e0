"""Estimates of a spectrum on matrices whose spectrum is known: right on average, and within their errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_influence.curvature.spectrum import measure_spectrum
from lightning_influence.linalg.estimates import Estimate, mean_of, orthonormal_rows, random_vectors, ratio_of
from lightning_influence.linalg.lanczos import block_lanczos
from lightning_influence.linalg.traces import hutch_pp, hutchinson

P = 60
DOUBLE = torch.float64


def matrix(values, seed=0):
    """A symmetric matrix with these eigenvalues and random eigenvectors, and products with it."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=DOUBLE, generator=generator)).Q
    H = Q @ torch.diag(values) @ Q.T
    return H, lambda v: (v.double() @ H).to(v.dtype)


def decaying(count=P):
    return 4.0 / torch.arange(1, count + 1, dtype=DOUBLE) ** 1.5


def indefinite(count=P):
    return torch.cat([decaying(count - 5), -torch.tensor([1.5, 0.3, 0.2, 0.1, 0.05], dtype=DOUBLE)])


def test_random_vectors_have_unit_covariance_and_follow_the_seed():
    for kind in ("signs", "normal"):
        z = random_vectors(20000, 5, 3, kind=kind, dtype=DOUBLE)
        assert torch.allclose(z.T @ z / 20000, torch.eye(5, dtype=DOUBLE), atol=0.05)
        assert torch.equal(z, random_vectors(20000, 5, 3, kind=kind, dtype=DOUBLE))
        assert not torch.equal(z, random_vectors(20000, 5, 4, kind=kind, dtype=DOUBLE))
    assert set(random_vectors(9, 9, 0).unique().tolist()) == {-1.0, 1.0}


def test_mean_and_ratio():
    assert mean_of(torch.tensor([1.0, 2.0, 3.0])) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_of(torch.tensor([1.0])).error == math.inf
    assert ratio_of(Estimate(6.0, 0.6), Estimate(2.0, 0.1)) == Estimate(3.0, pytest.approx(0.45))
    assert ratio_of(Estimate(6.0, None), Estimate(2.0, 0.1)) == Estimate(3.0, None)
    assert math.isnan(ratio_of(Estimate(1.0, 0.0), Estimate(0.0, 0.0)).value)
    assert str(Estimate(1.2345, 0.012)) == "1.234 +- 0.012"
    assert str(Estimate(2.0, None)) == "2"


def test_orthonormal_rows_leave_out_what_is_dependent():
    rows = torch.randn(3, 7, dtype=DOUBLE)
    rows = torch.cat([rows, rows[:1] + rows[1:2], torch.zeros(1, 7, dtype=DOUBLE)])
    basis, coefficients = orthonormal_rows(rows, 1e-10)
    assert basis.shape == (3, 7)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=DOUBLE))
    torch.testing.assert_close(coefficients @ basis, rows)


def covered(estimates, truth, sigmas):
    """Share of the estimates that are within so many of their own standard errors."""
    return sum(abs(e.value - truth) <= sigmas * e.error for e in estimates) / len(estimates)


@pytest.mark.parametrize("values", [decaying(), indefinite()], ids=["positive", "indefinite"])
@pytest.mark.parametrize("way", ["hutchinson", "hutch_pp", "spectrum"])
def test_traces_are_unbiased_and_within_their_standard_errors(way, values):
    H, product = matrix(values)
    trace, square = float(H.trace()), float((H @ H).trace())
    runs = []
    for seed in range(60):
        if way == "hutchinson":
            runs.append(hutchinson(product, random_vectors(12, P, seed, dtype=DOUBLE)))
        elif way == "hutch_pp":
            runs.append(hutch_pp(product, P, 24, seed, dtype=DOUBLE))
        else:
            runs.append(measure_spectrum(product, P, probes=6, steps=2, seed=seed, dtype=DOUBLE))
    for truth, name in ((trace, "trace"), (square, {"spectrum": "square_trace"}.get(way, "square"))):
        found = [getattr(run, name) for run in runs]
        mean = mean_of(torch.tensor([e.value for e in found], dtype=DOUBLE))
        assert abs(mean.value - truth) < 4 * mean.error  # 60 runs, fixed seeds
        # Normal errors would give .95; a handful of skewed samples a run gives somewhat less.
        assert covered(found, truth, 2) > 0.75
        assert covered(found, truth, 4) > 0.9


def test_hutch_pp_is_better_than_hutchinson_for_the_same_products():
    H, product = matrix(decaying())
    truth = float(H.trace())

    def error(estimates):
        return sum((e.value - truth) ** 2 for e in estimates) ** 0.5

    plain = [hutchinson(product, random_vectors(24, P, seed, dtype=DOUBLE)).trace for seed in range(30)]
    better = [hutch_pp(product, P, 24, seed, dtype=DOUBLE).trace for seed in range(30)]
    assert error(better) < 0.4 * error(plain)


@pytest.mark.parametrize("rank", [0, 3])
def test_hutch_pp_is_exact_on_low_rank(rank):
    values = torch.zeros(P, dtype=DOUBLE)
    values[:rank] = torch.tensor([3.0, -2.0, 0.5])[:rank]
    H, product = matrix(values)
    found = hutch_pp(product, P, 15, dtype=DOUBLE)
    assert found.trace.value == pytest.approx(float(H.trace()), abs=1e-10)
    assert found.square.value == pytest.approx(float((H @ H).trace()), abs=1e-10)
    small = hutch_pp(matrix(decaying(4))[1], 4, 30, dtype=DOUBLE)  # more products than dimensions
    assert small.trace == Estimate(pytest.approx(float(decaying(4).sum())), pytest.approx(0.0))
    with pytest.raises(ValueError, match="products=5; accepted are numbers of at least 6"):
        hutch_pp(product, P, 5)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("values", [decaying(), indefinite()], ids=["positive", "indefinite"])
def test_eigenvalues_lie_within_their_bounds(values, dtype):
    H, product = matrix(values)
    truth = values.sort(descending=True).values
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    for steps in (1, 2, 4, 8):
        ritz = block_lanczos(product, random_vectors(5, P, 1, kind="normal", dtype=dtype), steps)
        assert len(ritz.values) == 5 * steps
        gram = ritz.basis.double() @ ritz.basis.double().T
        torch.testing.assert_close(gram, torch.eye(5 * steps, dtype=DOUBLE), atol=10 * rounding, rtol=0)
        for found in [*ritz.top(5), ritz.bottom()]:
            assert (truth - found.value).abs().min() <= found.error + rounding
        for found, own in zip(ritz.top(5), truth, strict=False):
            assert found.value <= own + rounding
        assert ritz.bottom().value >= truth[-1] - rounding
    for found, own in zip(ritz.top(5), truth, strict=False):
        assert found.value == pytest.approx(float(own), rel=1e-3)
    assert ritz.norm().value == pytest.approx(4.0, rel=1e-4)
    vectors = ritz.vectors(3).double()
    for vector, value in zip(vectors, truth, strict=False):
        torch.testing.assert_close(H @ vector, value * vector, atol=0.02, rtol=0)


@settings(deadline=None, max_examples=25)
@given(size=st.integers(2, 14), probes=st.integers(1, 20), seed=st.integers(0, 10**6), copies=st.booleans())
@example(size=4, probes=1, seed=1, copies=True)
def test_a_space_that_is_exhausted_gives_the_spectrum_itself(size, probes, seed, copies):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, dtype=DOUBLE, generator=generator)
    if copies:  # a block sees an eigenvalue as often as it has vectors
        values = values[:1].expand(size).clone()
    H, product = matrix(values, seed)
    z = random_vectors(probes, size, seed, kind="normal", dtype=DOUBLE)
    ritz = block_lanczos(product, z, 40)
    count = min(probes, size) if copies else size
    assert len(ritz.values) == count
    if count == size:
        torch.testing.assert_close(ritz.values, values.sort().values, atol=1e-8, rtol=0)
    assert ritz.residuals.max() < 1e-7
    # Gauss quadrature: the moments of each random vector's spectral measure.
    for power in range(3):
        expected = (z @ torch.linalg.matrix_power(H, power) * z).sum(1) / z.square().sum(1)
        torch.testing.assert_close(ritz.weights @ ritz.values**power, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_quadrature_is_exact_for_polynomials(steps):
    H, product = matrix(indefinite())
    z = random_vectors(3, P, 0, kind="normal", dtype=DOUBLE)
    ritz = block_lanczos(product, z, steps)
    for power in range(2 * steps):
        expected = (z @ torch.linalg.matrix_power(H, power) * z).sum(1) / z.square().sum(1)
        torch.testing.assert_close(ritz.weights @ ritz.values**power, expected, atol=1e-9, rtol=1e-9)


def test_density_and_shares_match_the_eigenvalues():
    values = torch.cat([torch.zeros(140), torch.linspace(1, 2, 40), torch.full((20,), -1.0)]).double()
    _, product = matrix(values)
    spectrum = measure_spectrum(product, 200, probes=16, steps=6, dtype=DOUBLE, curvature="hessian")
    points, density, error = spectrum.density(400)
    width = (points[1] - points[0]).item()
    assert float(density.sum() * width) == pytest.approx(1.0, abs=0.01)
    for low, high, share in ((-1.3, -0.6, 0.1), (-0.3, 0.3, 0.7), (0.6, 2.6, 0.2)):
        mass = float(density[(points > low) & (points < high)].sum() * width)
        assert mass == pytest.approx(share, abs=0.03)
    assert (error >= 0).all()
    negative = spectrum.share_negative
    assert abs(negative.value - 0.1) < 4 * negative.error < 0.05
    with pytest.raises(ValueError, match=r"width=0.*positive"):
        spectrum.density(width=0.0)


def test_a_spectrum_has_facts_and_a_table():
    from lightning_influence.results.rendering import plain

    H, product = matrix(decaying())
    found = measure_spectrum(product, P, probes=6, steps=4, eigenvalues=3, dtype=DOUBLE)
    assert found.passes == 5
    values = decaying()
    assert found.stable_rank.value == pytest.approx(float(H.trace()) / 4, rel=0.02)
    assert found.numerical_rank.value == pytest.approx(float(values.square().sum()) / 16, rel=0.02)
    text = plain(found)
    for part in ("Spectrum of the Gauss-Newton matrix", "eigenvalue 3", "stable rank", "passes", "+-"):
        assert part in text
    assert "eigenvalue 4" not in text
    assert repr(found).startswith("Spectrum('ggn', trace=")
    exhausted = measure_spectrum(product, P, probes=30, steps=4, dtype=DOUBLE)
    assert exhausted.trace == Estimate(pytest.approx(float(H.trace())), 0.0)
    assert exhausted.passes == 2


@pytest.mark.parametrize(
    ("name", "value", "least"), [("probes", 1, 2), ("steps", 0, 1), ("eigenvalues", 0, 1), ("steps", True, 1)]
)
def test_numbers_out_of_range(name, value, least):
    with pytest.raises(ValueError, match=f"Got {name}={value}; accepted are integers of at least {least}"):
        measure_spectrum(matrix(decaying())[1], P, **{name: value})
    with pytest.raises(ValueError, match="steps=0; accepted are at least 1"):
        block_lanczos(matrix(decaying())[1], torch.ones(1, P), 0)
