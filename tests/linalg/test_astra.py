import pytest
import torch
from finite_sums import Preconditioned

from lightning_influence.linalg.astra import astra, plan_astra
from lightning_influence.linalg.lanczos import PreconditionedSpectrum
from lightning_influence.support.errors import DivergenceError


class Problem(Preconditioned):
    """Solved by ASTRA."""

    def plan(self, **options):
        return plan_astra(self.spectrum(), self.N, **options)

    def solve(self, plan, **options):
        return astra(
            self.product,
            self.batch_product,
            self.precondition,
            self.vectors,
            plan,
            num_examples=self.N,
            smallest=self.damping,
            **options,
        )


def test_the_first_step_of_length_one_is_the_preconditioner():
    problem = Problem()
    plan = plan_astra(PreconditionedSpectrum(1.0, 1.0, 1.0, 0), problem.N, step_size=1.0, momentum=0.9)
    result = problem.solve(plan, max_steps=1, tolerance=0.0)
    torch.testing.assert_close(result.solutions, problem.precondition(problem.vectors))
    torch.testing.assert_close(result.residuals, problem.residuals(result.solutions))


def test_steps_are_those_of_heavy_ball():
    problem = Problem()
    plan = problem.plan(step_size=0.3, momentum=0.6)
    result = problem.solve(plan, max_steps=7, tolerance=0.0)
    for v, found in zip(problem.vectors, result.solutions, strict=True):
        theta, velocity = torch.zeros_like(v), torch.zeros_like(v)
        for _ in range(7):
            velocity = 0.6 * velocity + problem.M @ (problem.A @ theta - v)
            theta = theta - 0.3 * velocity
        torch.testing.assert_close(found, theta)


@pytest.mark.grid
@pytest.mark.parametrize("damping", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"momentum": 0.9}, {"batch_size": 100}])
def test_derived_steps_converge(damping, options):
    problem = Problem(damping=damping, decay=1.0)
    result = problem.solve(problem.plan(**options), max_steps=4000, tolerance=1e-4)
    assert problem.residuals(result.solutions).max() <= 1e-4
    torch.testing.assert_close(result.residuals, problem.residuals(result.solutions), rtol=1e-4, atol=1e-9)


def test_derived_momentum_saves_steps():
    problem = Problem(damping=1e-3)
    plain = problem.solve(problem.plan(momentum=0.0), max_steps=4000, tolerance=1e-4)
    derived = problem.solve(problem.plan(), max_steps=4000, tolerance=1e-4)
    assert derived.steps < 0.7 * plain.steps


def test_steps_that_diverge_are_refused_beforehand():
    problem = Problem()
    top = float(problem.eigenvalues[-1])
    with pytest.raises(DivergenceError, match=r"diverges: the largest eigenvalue .* Change step_size"):
        problem.plan(step_size=2.1 / top, momentum=0.0)
    with pytest.raises(DivergenceError, match="Change batch_size"):
        problem.plan(step_size=1.5 / top, momentum=0.0, batch_size=1)
    problem.plan(step_size=3.0 / top, momentum=0.9)  # momentum takes longer steps


def test_a_spectrum_that_was_estimated_too_low_is_named():
    problem = Problem()
    wrong = PreconditionedSpectrum(float(problem.eigenvalues[-1]) / 4, 0.1, 30.0, 0)
    plan = plan_astra(wrong, problem.N, momentum=0.0)
    with pytest.raises(DivergenceError, match="estimated too low"):
        problem.solve(plan, max_steps=500)
    with pytest.raises(DivergenceError, match="the batch is too small"):
        problem.solve(plan_astra(wrong, problem.N, momentum=0.0, batch_size=4, kappa=0.01), max_steps=500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "Got momentum=1.0; accepted are numbers from 0 to below 1"),
        ({"batch_size": 0}, "Got batch_size=0; accepted are 1 to 400"),
        ({"batch_size": 401}, "Got batch_size=401; accepted are 1 to 400"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        plan_astra(PreconditionedSpectrum(1.0, 0.5, 10.0, 0), 400, **options)


@pytest.mark.parametrize("options", [{}, {"batch_size": 100}])
def test_float32_reports_true_residuals(options):
    problem = Problem(damping=0.05, decay=1.0, dtype=torch.float32)
    result = problem.solve(problem.plan(**options), max_steps=600, tolerance=1e-6)
    torch.testing.assert_close(
        result.residuals.double(), problem.residuals(result.solutions), rtol=1e-5, atol=0
    )
