"""The measured spectrum of matrices whose spectrum is known."""

from __future__ import annotations

import pytest
import torch
from known_spectra import DOUBLE, P, covered, decaying, indefinite, matrix

from lightning_influence.curvature.spectrum import measure_spectrum
from lightning_influence.linalg.estimates import Estimate, average
from lightning_influence.results.rendering import render_plain


@pytest.mark.parametrize("values", [decaying(), indefinite()], ids=["positive", "indefinite"])
def test_traces_are_unbiased_and_within_their_standard_errors(values):
    H, product = matrix(values)
    runs = [measure_spectrum(product, P, probes=6, steps=2, seed=seed, dtype=DOUBLE) for seed in range(60)]
    for truth, name in ((float(H.trace()), "trace"), (float((H @ H).trace()), "square_trace")):
        found = [getattr(run, name) for run in runs]
        mean = average(torch.tensor([e.value for e in found], dtype=DOUBLE))
        assert abs(mean.value - truth) < 4 * mean.error  # 60 runs, fixed seeds
        # Normal errors would give .95; a handful of skewed samples a run gives somewhat less.
        assert covered(found, truth, 2) > 0.75
        assert covered(found, truth, 4) > 0.9


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
    H, product = matrix(decaying())
    found = measure_spectrum(product, P, probes=6, steps=4, eigenvalues=3, dtype=DOUBLE)
    assert found.passes == 5
    values = decaying()
    assert found.stable_rank.value == pytest.approx(float(H.trace()) / 4, rel=0.02)
    assert found.numerical_rank.value == pytest.approx(float(values.square().sum()) / 16, rel=0.02)
    text = render_plain(found)
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
