"""Lanczos on matrices whose spectrum is known: block Lanczos, and the recursion with a preconditioner."""

from __future__ import annotations

import pytest
import torch
from finite_sums import Preconditioned
from hypothesis import example, given, settings
from hypothesis import strategies as st
from known_spectra import DOUBLE, P, decaying, indefinite, matrix

from lightning_influence.linalg.estimates import draw_vectors
from lightning_influence.linalg.lanczos import (
    block_lanczos,
    estimate_largest_eigenvalue,
)
from lightning_influence.support.errors import IndefiniteError


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("values", [decaying(), indefinite()], ids=["positive", "indefinite"])
def test_eigenvalues_lie_within_their_bounds(values, dtype):
    H, product = matrix(values)
    truth = values.sort(descending=True).values
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    for steps in (1, 2, 4, 8):
        ritz = block_lanczos(product, draw_vectors(5, P, 1, kind="normal", dtype=dtype), steps)
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
    z = draw_vectors(probes, size, seed, kind="normal", dtype=DOUBLE)
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
    z = draw_vectors(3, P, 0, kind="normal", dtype=DOUBLE)
    ritz = block_lanczos(product, z, steps)
    for power in range(2 * steps):
        expected = (z @ torch.linalg.matrix_power(H, power) * z).sum(1) / z.square().sum(1)
        torch.testing.assert_close(ritz.weights @ ritz.values**power, expected, atol=1e-9, rtol=1e-9)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps=0; accepted are at least 1"):
        block_lanczos(matrix(decaying())[1], torch.ones(1, P), 0)


@given(st.integers(0, 30), st.booleans())
@settings(max_examples=20, deadline=None)
def test_largest_eigenvalue(seed, negative):
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(14, 14, generator=generator, dtype=DOUBLE)
    H = (half + half.T) / 2 if negative else half @ half.T / 14
    start = torch.randn(14, generator=generator, dtype=DOUBLE)
    largest = float(torch.linalg.eigvalsh(H).abs().max())
    product = lambda v: v @ H  # noqa: E731
    assert estimate_largest_eigenvalue(product, start, steps=14) == pytest.approx(largest, rel=1e-8)
    few = estimate_largest_eigenvalue(product, start, steps=5)
    assert 0.6 * largest < few <= largest * (1 + 1e-12)


def test_largest_eigenvalue_of_nothing():
    assert estimate_largest_eigenvalue(torch.zeros_like, torch.ones(4, dtype=DOUBLE)) == 0.0
    assert estimate_largest_eigenvalue(lambda v: v, torch.zeros(4, dtype=DOUBLE)) == 0.0


@pytest.mark.parametrize("damping", [1.0, 1e-2])
def test_the_ends_of_the_spectrum(damping):
    problem = Preconditioned(damping=damping)
    found = problem.spectrum(steps=problem.P)
    assert found.largest == pytest.approx(float(problem.eigenvalues[-1]), rel=1e-6)
    assert found.smallest == pytest.approx(float(problem.eigenvalues[0]), rel=1e-6)
    few = problem.spectrum(steps=6)
    assert few.products == 7
    assert float(problem.eigenvalues[-1]) <= few.largest <= 1.5 * float(problem.eigenvalues[-1])
    assert few.smallest >= float(problem.eigenvalues[0]) * (1 - 1e-9)
    many = problem.spectrum(probes=2000, steps=1)
    assert many.trace == pytest.approx(float(problem.eigenvalues.sum()), rel=0.02)


def test_an_indefinite_spectrum_is_refused():
    problem = Preconditioned()
    problem.A = problem.A - 0.5 * torch.eye(problem.P, dtype=torch.float64)
    with pytest.raises(IndefiniteError, match="has an eigenvalue of -"):
        problem.spectrum(steps=20)
