import pytest
import torch
from finite_sums import FiniteSum

from lightning_influence.linalg.conjugate_gradients import conjugate_gradients
from lightning_influence.linalg.minres import minres
from lightning_influence.support.errors import DivergenceError, IndefiniteError


def test_it_ends_at_the_exact_solution():
    problem = FiniteSum()
    result = conjugate_gradients(problem.product, problem.vectors, max_steps=200, tolerance=1e-12)
    torch.testing.assert_close(result.solutions, problem.exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.residuals, problem.residuals(result.solutions), rtol=1e-6, atol=1e-14)
    assert result.residuals.max() <= 1e-12
    assert result.history[0] == 1.0
    assert result.history[-1] <= 1e-12


def test_steps_are_those_of_the_textbook():
    """One vector at a time in the three-term form of Hestenes and Stiefel."""
    problem = FiniteSum()
    A, expected = problem.A, []
    for v in problem.vectors:
        x, r = torch.zeros_like(v), v.clone()
        p = r.clone()
        for _ in range(5):
            alpha = (r @ r) / (p @ A @ p)
            x, new = x + alpha * p, r - alpha * (A @ p)
            p, r = new + (new @ new) / (r @ r) * p, new
        expected.append(x)
    result = conjugate_gradients(problem.product, problem.vectors, max_steps=5, tolerance=0.0)
    torch.testing.assert_close(result.solutions, torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert result.steps == 5


def test_an_exact_preconditioner_needs_one_step():
    problem = FiniteSum()
    inverse = torch.linalg.inv(problem.A)
    result = conjugate_gradients(problem.product, problem.vectors, precondition=lambda v: v @ inverse)
    assert result.steps == 1
    assert problem.residuals(result.solutions).max() < 1e-10


def test_a_preconditioner_saves_steps():
    problem = FiniteSum(damping=1e-4, decay=2.5)
    values, vectors = torch.linalg.eigh(problem.A)
    spread = torch.exp(0.3 * torch.randn(problem.P, dtype=torch.float64))
    inverse = vectors / (values * spread) @ vectors.T
    plain = conjugate_gradients(problem.product, problem.vectors, max_steps=500, tolerance=1e-8)
    better = conjugate_gradients(
        problem.product, problem.vectors, precondition=lambda v: v @ inverse, max_steps=500, tolerance=1e-8
    )
    assert problem.residuals(better.solutions).max() <= 1e-8
    assert 2 * better.steps < plain.steps


def test_solved_right_hand_sides_drop_out():
    problem = FiniteSum(damping=1e-3, decay=2.0)
    _, vectors = torch.linalg.eigh(problem.A)
    problem.vectors = torch.stack([vectors[:, -1], problem.vectors[0], torch.zeros(problem.P).double()])
    sizes = []

    def product(v):
        sizes.append(len(v))
        return problem.product(v)

    result = conjugate_gradients(product, problem.vectors, max_steps=300, tolerance=1e-9)
    assert sizes[0] == 2  # a zero right-hand side takes no part
    assert sizes[1] == 1  # an eigenvector is solved in one step
    assert problem.residuals(result.solutions)[:2].max() <= 1e-9
    assert not result.solutions[2].any()
    assert result.residuals[2] == 0


def test_no_steps_return_zero():
    problem = FiniteSum()
    result = conjugate_gradients(problem.product, problem.vectors, max_steps=0)
    assert not result.solutions.any()
    assert result.residuals.tolist() == [1.0] * 4


def test_negative_curvature_is_named():
    problem = FiniteSum(damping=-0.5)
    with pytest.raises(
        IndefiniteError, match=r"met negative curvature: .* raise the damping by more than 0\.\d+"
    ):
        conjugate_gradients(problem.product, problem.vectors)


def test_a_preconditioner_that_is_not_positive_is_named():
    problem = FiniteSum()
    with pytest.raises(IndefiniteError, match="has to be symmetric positive definite"):
        conjugate_gradients(problem.product, problem.vectors, precondition=lambda v: -v)


def test_a_singular_matrix_is_solved_where_it_can_be():
    problem = FiniteSum(N=10, damping=0.0)
    problem.vectors = problem.vectors @ problem.A  # in the range
    result = conjugate_gradients(problem.product, problem.vectors, max_steps=100, tolerance=1e-8)
    assert problem.residuals(result.solutions).max() <= 1e-8


@pytest.mark.parametrize("solver", [conjugate_gradients, minres])
def test_what_only_grows_is_no_answer(solver):
    problem = FiniteSum(N=10, damping=0.0, dtype=torch.float32)
    A = problem.A.float() * (1 + 1e-4 * torch.randn(problem.P, problem.P)).triu()  # not even symmetric
    try:
        result = solver(lambda v: v @ A.to(v.dtype), problem.vectors, max_steps=400, tolerance=1e-6)
    except (DivergenceError, IndefiniteError):
        return
    assert result.residuals.max() <= 10


def test_a_singular_system_without_a_solution_is_no_answer():
    problem = FiniteSum(N=10, damping=0.0)
    with pytest.raises(DivergenceError, match=r"moved away from the solution: .* Raise the damping"):
        conjugate_gradients(problem.product, problem.vectors, max_steps=200, tolerance=1e-3)


def test_nothing_finite_is_refused():
    problem = FiniteSum()
    with pytest.raises(DivergenceError, match="not finite"):
        conjugate_gradients(lambda v: v * float("nan"), problem.vectors)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4])
def test_float32_reports_true_residuals(tolerance):
    problem = FiniteSum(damping=1e-3, decay=2.0, dtype=torch.float32)
    result = conjugate_gradients(problem.product, problem.vectors, max_steps=500, tolerance=tolerance)
    true = problem.residuals(result.solutions)
    torch.testing.assert_close(result.residuals.double(), true, rtol=1e-5, atol=0)
    assert true.max() <= 1.3 * tolerance + 1e-6


def test_float32_stops_at_its_precision():
    problem = FiniteSum(damping=1e-4, decay=2.0, dtype=torch.float32)
    result = conjugate_gradients(problem.product, problem.vectors, max_steps=5000, tolerance=1e-12)
    assert result.steps < 5000
    true = problem.residuals(result.solutions)
    assert 1e-9 < true.max() < 1e-3
    torch.testing.assert_close(result.residuals.double(), true, rtol=1e-5, atol=0)
