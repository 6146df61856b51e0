"""Least squares over a subset, against dense algebra, for definite and indefinite matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.linalg.lanczos import estimate_largest_eigenvalue
from lightning_influence.linalg.normal_equations import (
    SingularSubsetError,
    derive_squared_scale,
    draw_start,
    make_normal_product,
    solve_by_lissa,
    solve_densely,
    solve_positive,
)
from lightning_influence.support.errors import InfluenceError

CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def problem(size=14, seed=0, indefinite=True):
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(size, size, generator=generator, dtype=torch.float64)
    H = (half + half.T) / 2 if indefinite else half @ half.T / size
    g = torch.randn(size, generator=generator, dtype=torch.float64)
    mask = torch.rand(size, generator=generator) < 0.5
    mask[0] = True
    return H, g, mask


def product(H):
    return lambda vectors: vectors @ H


def by_hand(H, g, mask, ridge):
    """argmin over the chosen columns, by a stacked least-squares problem."""
    columns = H[:, mask]
    tall = torch.cat([columns, ridge**0.5 * torch.eye(columns.shape[1], dtype=H.dtype)])
    right = torch.cat([g, torch.zeros(columns.shape[1], dtype=H.dtype)])
    full = torch.zeros_like(g)
    full[mask] = torch.linalg.lstsq(tall, right[:, None]).solution[:, 0]
    return full


def solve(H, g, mask, ridge, **options):
    normal = make_normal_product(product(H), mask, ridge)
    right = (H @ g) * mask
    inverse = mask / ((H @ H).diagonal() + ridge)
    limits = {"tolerance": 1e-12, "max_steps": 400, **options}
    return solve_positive(normal, right, inverse_diagonal=inverse, **limits)


@pytest.mark.slow
@given(st.integers(0, 40), st.booleans(), st.sampled_from([0.01, 1.0]))
@settings(max_examples=30, deadline=None)
def test_every_solver_is_the_least_squares_solution(seed, indefinite, ridge):
    H, g, mask = problem(seed=seed, indefinite=indefinite)
    expected = by_hand(H, g, mask, ridge)
    torch.testing.assert_close(solve(H, g, mask, ridge).vector, expected, **CLOSE)
    torch.testing.assert_close(solve_densely(product(H), g, mask, ridge).vector, expected, **CLOSE)
    normal = make_normal_product(product(H), mask, ridge)
    nu2 = derive_squared_scale(normal, draw_start(mask, g, 0))
    lissa = solve_by_lissa(normal, (H @ g) * mask, nu2, tolerance=1e-12, max_steps=60_000)
    torch.testing.assert_close(lissa.vector, expected, **CLOSE)


def test_everything_selected_and_invertible_is_the_inverse():
    H, g, _ = problem()
    everything = torch.ones(len(g), dtype=torch.bool)
    expected = torch.linalg.solve(H, g)
    for found in (solve(H, g, everything, 0.0), solve_densely(product(H), g, everything)):
        torch.testing.assert_close(found.vector, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("factor", "converges"), [(0.51, True), (0.49, False)])
def test_lissa_converges_just_above_half_the_largest_eigenvalue(factor, converges):
    H, g, mask = problem()
    values = torch.linalg.eigvalsh((H @ H)[mask][:, mask])
    normal, right = make_normal_product(product(H), mask, 0.0), (H @ g) * mask
    if converges:
        found = solve_by_lissa(normal, right, factor * float(values[-1]), tolerance=1e-8, max_steps=50_000)
        torch.testing.assert_close(found.vector, by_hand(H, g, mask, 0.0), rtol=1e-4, atol=1e-6)
    else:
        with pytest.raises(InfluenceError, match="diverged after"):
            solve_by_lissa(normal, right, factor * float(values[-1]), tolerance=1e-8, max_steps=50_000)


def test_fixed_point_of_lissa_does_not_depend_on_the_scale():
    H, g, mask = problem(seed=3)
    normal, right = make_normal_product(product(H), mask, 0.1), (H @ g) * mask
    top = estimate_largest_eigenvalue(normal, draw_start(mask, g, 0), 30)
    found = [solve_by_lissa(normal, right, f * top, tolerance=1e-13, max_steps=20_000) for f in (0.6, 1.7)]
    torch.testing.assert_close(found[0].vector, found[1].vector, **CLOSE)


def test_solutions_stay_inside_the_subset():
    H, g, mask = problem(seed=5)
    assert not solve(H, g, mask, 0.1).vector[~mask].any()
    assert not solve_densely(product(H), g, mask, 0.1).vector[~mask].any()


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_residual_is_that_of_the_returned_vector(steps):
    H, g, mask = problem(seed=7, size=30)
    found = solve(H, g, mask, 0.01, tolerance=1e-14, max_steps=steps)
    right = (H @ g) * mask
    left = make_normal_product(product(H), mask, 0.01)(found.vector[None])[0]
    assert found.residual == pytest.approx(float((right - left).norm() / right.norm()), rel=1e-9)
    assert found.steps == steps


def test_nothing_to_solve():
    H, g, mask = problem()
    zero = solve_positive(make_normal_product(product(H), mask, 0.0), torch.zeros_like(g))
    assert (zero.steps, zero.residual, bool(zero.vector.any())) == (0, 0.0, False)


def test_negative_curvature_is_noticed():
    H = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    right = torch.tensor([0.1, 1.0], dtype=torch.float64)
    found = solve_positive(product(H), right)
    assert not found.definite


def test_a_direction_without_curvature_is_noticed():
    H = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    found = solve_positive(product(H), torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert found.unresolved
    assert found.definite


def test_dense_refuses_what_is_singular_or_large():
    H = torch.ones(3, 3, dtype=torch.float64)
    everything = torch.ones(3, dtype=torch.bool)
    with pytest.raises(SingularSubsetError, match=r"2 combinations .* positive damping"):
        solve_densely(product(H), H[0], everything)
    solve_densely(product(H), H[0], everything, ridge=0.1)
    with pytest.raises(ValueError, match="at most 2 parameters"):
        solve_densely(product(H), H[0], everything, limit=2)
