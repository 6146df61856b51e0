import pytest
import torch
from finite_sums import FiniteSum

from lightning_influence.linalg.astra import astra, plan_astra
from lightning_influence.linalg.preconditioned_spectrum import PreconditionedSpectrum, preconditioned_spectrum
from lightning_influence.support.errors import DivergenceError, IndefiniteError


class Preconditioned(FiniteSum):
    """With a preconditioner in a basis that is a little off, as EK-FAC's is."""

    def __init__(self, **options):
        super().__init__(**options)
        identity = torch.eye(self.P, dtype=torch.float64)
        basis = torch.linalg.qr(identity + 0.02 * torch.randn(self.P, self.P, dtype=torch.float64)).Q
        _, vectors = torch.linalg.eigh(self.A)
        basis = vectors @ basis
        spread = torch.exp(0.3 * torch.randn(self.P, dtype=torch.float64))
        self.M = basis / ((basis.T @ self.A @ basis).diagonal() * spread) @ basis.T
        self.eigenvalues = torch.linalg.eigvals(self.M @ self.A).real.sort().values

    def precondition(self, v):
        return v @ self.M.to(v.dtype)

    def spectrum(self, **options):
        return preconditioned_spectrum(self.product, self.precondition, self.vectors, **options)

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
    problem = Preconditioned()
    plan = plan_astra(PreconditionedSpectrum(1.0, 1.0, 1.0, 0), problem.N, step_size=1.0, momentum=0.9)
    result = problem.solve(plan, max_steps=1, tolerance=0.0)
    torch.testing.assert_close(result.solutions, problem.precondition(problem.vectors))
    torch.testing.assert_close(result.residuals, problem.residuals(result.solutions))


def test_steps_are_those_of_heavy_ball():
    problem = Preconditioned()
    plan = problem.plan(step_size=0.3, momentum=0.6)
    result = problem.solve(plan, max_steps=7, tolerance=0.0)
    for v, found in zip(problem.vectors, result.solutions, strict=True):
        theta, velocity = torch.zeros_like(v), torch.zeros_like(v)
        for _ in range(7):
            velocity = 0.6 * velocity + problem.M @ (problem.A @ theta - v)
            theta = theta - 0.3 * velocity
        torch.testing.assert_close(found, theta)


@pytest.mark.parametrize("damping", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"momentum": 0.9}, {"batch_size": 100}])
def test_derived_steps_converge(damping, options):
    problem = Preconditioned(damping=damping, decay=1.0)
    result = problem.solve(problem.plan(**options), max_steps=4000, tolerance=1e-4)
    assert problem.residuals(result.solutions).max() <= 1e-4
    torch.testing.assert_close(result.residuals, problem.residuals(result.solutions), rtol=1e-4, atol=1e-9)


def test_derived_momentum_saves_steps():
    problem = Preconditioned(damping=1e-3)
    plain = problem.solve(problem.plan(momentum=0.0), max_steps=4000, tolerance=1e-4)
    derived = problem.solve(problem.plan(), max_steps=4000, tolerance=1e-4)
    assert derived.steps < 0.7 * plain.steps


def test_steps_that_diverge_are_refused_beforehand():
    problem = Preconditioned()
    top = float(problem.eigenvalues[-1])
    with pytest.raises(DivergenceError, match=r"diverges: the largest eigenvalue .* Change step_size"):
        problem.plan(step_size=2.1 / top, momentum=0.0)
    with pytest.raises(DivergenceError, match="Change batch_size"):
        problem.plan(step_size=1.5 / top, momentum=0.0, batch_size=1)
    problem.plan(step_size=3.0 / top, momentum=0.9)  # momentum takes longer steps


def test_a_spectrum_that_was_estimated_too_low_is_named():
    problem = Preconditioned()
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
