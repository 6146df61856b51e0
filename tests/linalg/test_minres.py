import pytest
import torch
from finite_sums import FiniteSum
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.linalg.minres import minres
from lightning_influence.support.errors import IndefiniteError


class Indefinite(FiniteSum):
    """Every third eigenvalue of the damped matrix with its sign turned."""

    def __init__(self, **options):
        super().__init__(**options)
        values, vectors = torch.linalg.eigh(self.A)
        self.absolute = vectors * values @ vectors.T
        self.inverse_absolute = vectors / values @ vectors.T
        values = values.clone()
        values[::3] *= -1
        self.A = vectors * values @ vectors.T
        self.exact = torch.linalg.solve(self.A, self.vectors.double().T).T


@pytest.mark.parametrize("kind", [FiniteSum, Indefinite])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_it_ends_at_the_exact_solution(kind, preconditioned):
    problem = kind()
    precondition = None
    if preconditioned:
        diagonal = problem.A.diagonal().abs() + 0.1
        precondition = lambda v: v / diagonal  # noqa: E731
    result = minres(
        problem.product, problem.vectors, precondition=precondition, max_steps=300, tolerance=1e-11
    )
    torch.testing.assert_close(result.solutions, problem.exact, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(result.residuals, problem.residuals(result.solutions), rtol=1e-5, atol=1e-13)
    assert result.residuals.max() <= 1e-11


@pytest.mark.parametrize("kind", [FiniteSum, Indefinite])
def test_every_step_has_the_smallest_residual_of_its_krylov_space(kind):
    problem = kind()
    for steps in (1, 2, 5):
        found = minres(problem.product, problem.vectors, max_steps=steps, tolerance=0.0)
        assert found.steps == steps
        for v, residual in zip(problem.vectors, found.residuals, strict=True):
            space = torch.stack(
                [torch.linalg.matrix_power(problem.A, k) @ v for k in range(1, steps + 1)], dim=1
            )
            best = v - space @ torch.linalg.lstsq(space, v[:, None]).solution[:, 0]
            assert float(residual) == pytest.approx(float(best.norm() / v.norm()), rel=1e-6)


def test_the_absolute_value_as_preconditioner_needs_two_steps():
    problem = Indefinite()
    result = minres(
        problem.product, problem.vectors, precondition=lambda v: v @ problem.inverse_absolute, tolerance=1e-9
    )
    assert result.steps == 2


def test_solved_right_hand_sides_drop_out():
    problem = Indefinite()
    _, vectors = torch.linalg.eigh(problem.A)
    problem.vectors = torch.stack([vectors[:, 0], problem.vectors[0], torch.zeros(problem.P).double()])
    sizes = []

    def product(v):
        sizes.append(len(v))
        return problem.product(v)

    result = minres(product, problem.vectors, max_steps=300, tolerance=1e-9)
    assert sizes[:2] == [2, 1]
    assert problem.residuals(result.solutions)[:2].max() <= 1e-9
    assert not result.solutions[2].any()


def test_a_singular_matrix():
    problem = FiniteSum(N=10, damping=0.0)
    inside = problem.vectors @ problem.A
    result = minres(problem.product, inside, max_steps=100, tolerance=1e-8)
    assert (inside - result.solutions @ problem.A).norm() <= 1e-7 * inside.norm()
    # Where there is no solution, the smallest residual is what is outside of the range.
    result = minres(problem.product, problem.vectors, max_steps=100, tolerance=1e-8)
    best = problem.vectors - problem.vectors @ torch.linalg.pinv(problem.A, rtol=1e-10) @ problem.A
    expected = best.norm(dim=1) / problem.vectors.norm(dim=1)
    torch.testing.assert_close(result.residuals, expected, rtol=1e-4, atol=1e-6)


def test_a_preconditioner_that_is_not_positive_is_named():
    problem = Indefinite()
    with pytest.raises(IndefiniteError, match="needs a positive definite preconditioner"):
        minres(problem.product, problem.vectors, precondition=lambda v: -v)


def test_float32_reports_true_residuals():
    problem = Indefinite(dtype=torch.float32)
    result = minres(problem.product, problem.vectors, max_steps=500, tolerance=1e-4)
    true = problem.residuals(result.solutions)
    torch.testing.assert_close(result.residuals.double(), true, rtol=1e-5, atol=0)
    assert true.max() <= 1.2e-4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 4))
def test_random_symmetric_matrices(seed, size, count):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(size, size, dtype=torch.float64, generator=generator)
    A = A + A.T
    values, vectors = torch.linalg.eigh(A)
    A = vectors * (values.sign() * (values.abs() + 0.1)) @ vectors.T
    v = torch.randn(count, size, dtype=torch.float64, generator=generator)
    result = minres(lambda x: x @ A, v, max_steps=20 * size, tolerance=1e-8)
    torch.testing.assert_close(result.solutions @ A, v, rtol=1e-5, atol=1e-6)
