import pytest
import torch
from finite_sums import FiniteSum

from lightning_influence.linalg.chebyshev import chebyshev, count_chebyshev_steps
from lightning_influence.support.errors import DivergenceError


def interval(problem):
    values = torch.linalg.eigvalsh(problem.A)
    return {"smallest": float(values[0]), "largest": float(values[-1])}


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-6])
@pytest.mark.parametrize("damping", [10.0, 0.1, 1e-3])
def test_as_many_steps_as_are_derived_suffice_for_any_right_hand_side(tolerance, damping):
    problem = FiniteSum(damping=damping)
    ends = interval(problem)
    steps = count_chebyshev_steps(ends["smallest"], ends["largest"], tolerance)
    _, eigenvectors = torch.linalg.eigh(problem.A)
    problem.vectors = torch.cat([problem.vectors, eigenvectors[:, [0, 1, -1]].T])
    problem.exact = torch.linalg.solve(problem.A, problem.vectors.T).T
    result = chebyshev(problem.product, problem.vectors, **ends, max_steps=steps, tolerance=0.0)
    assert result.steps == steps
    assert problem.errors(result.solutions).max() <= tolerance * (1 + 1e-9)


def test_the_number_of_steps_grows_with_the_root_of_the_ratio():
    few, many = count_chebyshev_steps(1.0, 100.0, 0.05), count_chebyshev_steps(1.0, 10_000.0, 0.05)
    assert many == pytest.approx(10 * few, rel=0.1)
    assert count_chebyshev_steps(1.0, 1.0, 0.05) == 1


def test_it_stops_when_the_error_is_certain():
    problem = FiniteSum(damping=0.5)
    result = chebyshev(problem.product, problem.vectors, **interval(problem), max_steps=500, tolerance=0.02)
    assert problem.errors(result.solutions).max() <= result.facts["error_bound"] <= 0.02
    torch.testing.assert_close(result.residuals, problem.residuals(result.solutions))
    assert result.steps < 60


def test_enough_steps_make_do_with_the_residual():
    problem = FiniteSum(damping=1e-3)
    ends = interval(problem)
    steps = count_chebyshev_steps(**ends, tolerance=0.05)
    result = chebyshev(
        problem.product, problem.vectors, **ends, max_steps=10 * steps, enough_steps=steps, tolerance=0.05
    )
    assert result.steps == steps
    assert problem.errors(result.solutions).max() <= 0.05


def test_a_guess_and_a_zero_right_hand_side():
    problem = FiniteSum()
    problem.vectors[1] = 0
    problem.exact[1] = 0
    ends = interval(problem)
    first = chebyshev(problem.product, problem.vectors, **ends, max_steps=300, tolerance=1e-3)
    assert not first.solutions[1].any()
    further = chebyshev(
        problem.product, problem.vectors, **ends, guess=first.solutions, max_steps=300, tolerance=1e-9
    )
    assert problem.residuals(further.solutions)[[0, 2, 3]].max() <= 1e-9
    assert (
        further.steps
        < chebyshev(problem.product, problem.vectors, **ends, tolerance=1e-9, max_steps=300).steps
    )


def test_an_eigenvalue_above_the_interval_is_named():
    problem = FiniteSum(damping=0.1)
    ends = interval(problem)
    ends["largest"] /= 3
    with pytest.raises(
        DivergenceError, match=r"assume eigenvalues up to .* directions of curvature .* were met"
    ):
        chebyshev(problem.product, problem.vectors, **ends, max_steps=500, tolerance=1e-6)


def test_float32_reports_true_residuals():
    problem = FiniteSum(damping=1e-3, dtype=torch.float32)
    ends = interval(problem)
    result = chebyshev(problem.product, problem.vectors, **ends, max_steps=2000, tolerance=1e-12)
    true = problem.residuals(result.solutions)
    assert true.max() > 1e-8  # as far as float32 goes
    torch.testing.assert_close(result.residuals.double(), true, rtol=1e-5, atol=0)
