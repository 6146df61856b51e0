import pytest
import torch
from finite_sums import FiniteSum

from lightning_influence.linalg.stopping import Progress, bound_errors, compute_remainder, run_sweeps
from lightning_influence.support.errors import DivergenceError


def test_residuals_are_relative_and_watched_one_by_one():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-6, 0.0]])
    progress = Progress(vectors, 0.1)
    assert progress.observe(vectors).tolist() == [True, False, True]
    torch.testing.assert_close(progress.residuals, torch.tensor([1.0, 0.0, 1.0]))
    assert progress.observe(vectors[2:] / 20, torch.tensor([2])).tolist() == [False]
    torch.testing.assert_close(progress.residuals, torch.tensor([1.0, 0.0, 0.05]))
    assert progress.history == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    vectors = torch.ones(2, 3)
    with pytest.raises(DivergenceError, match="The residual of 1 right-hand sides is not finite"):
        Progress(vectors, 0.1).observe(torch.stack([vectors[0], vectors[1] * bad]))


def test_error_bounds_hold_and_are_reached():
    problem = FiniteSum()
    values, vectors = torch.linalg.eigh(problem.A)
    solutions = problem.exact + 0.05 * problem.exact.norm(
        dim=1, keepdim=True
    ) * torch.nn.functional.normalize(torch.randn_like(problem.exact), dim=1)
    remainder = problem.vectors - solutions @ problem.A
    bounds = bound_errors(remainder, solutions, float(values[0]))
    assert (bounds >= problem.errors(solutions)).all()
    # Reached to first order by an error along the eigenvector of the smallest eigenvalue.
    problem.exact = problem.exact[:1]
    solution = problem.exact + 0.01 * problem.exact.norm() * vectors[:, :1].T
    remainder = problem.vectors[:1] - solution @ problem.A
    assert float(bound_errors(remainder, solution, float(values[0]))) == pytest.approx(0.01, rel=0.05)


def test_error_bounds_where_the_residual_says_nothing():
    bounds = bound_errors(torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[0.5], [1.0], [0.0]]), 1.0)
    assert bounds.tolist() == [float("inf"), 0.0, 0.0]


def test_sweeps_go_on_until_the_true_residual_agrees():
    """A recursion that claims too much is started again; one that gains nothing is not."""
    A, vectors = 2.0, torch.ones(1, 4)
    calls = []

    def careless(progress, solutions, remainder, rows, limit):
        calls.append(limit)
        solutions[rows] += 0.9 * remainder / A
        return 1

    result = run_sweeps(lambda v: A * v, vectors, careless, max_steps=10, tolerance=1e-3)
    assert calls == [10, 9, 8]
    assert float(result.residuals) == pytest.approx(1e-3, rel=1e-3)
    assert (result.steps, result.products) == (3, 6)
    calls.clear()

    def harmful(progress, solutions, remainder, rows, limit):
        careless(progress, solutions, remainder, rows, limit)
        if len(calls) > 1:
            solutions[rows] += 5
        return 1

    result = run_sweeps(lambda v: A * v, vectors, harmful, max_steps=10, tolerance=1e-3)
    assert float(result.residuals) == pytest.approx(0.1)  # the harm of the restart is undone
    assert len(calls) == 2


def test_residuals_are_known_in_a_higher_precision_than_the_answer():
    """The rounded exact solution: in float32 its residual drowns in the rounding of the product."""
    problem = FiniteSum(damping=1e-3, decay=2.0)
    solutions, vectors = problem.exact.float(), problem.vectors.float()
    problem.vectors = vectors
    truth = problem.vectors.double() - solutions.double() @ problem.A
    remainder = compute_remainder(problem.product, vectors, solutions)
    assert remainder.dtype == torch.float64
    torch.testing.assert_close(remainder, truth, rtol=1e-6, atol=1e-12)
    careless = vectors - problem.product(solutions)
    assert (careless.double() - truth).norm() > 0.1 * truth.norm()
