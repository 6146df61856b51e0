from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_influence.linalg.block_krylov import Subspace, block_krylov

P, V = 40, 3


class Problem:
    """A damped matrix of full spectrum, an imperfect preconditioner, and counted products."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        Q = torch.linalg.qr(torch.randn(P, P, dtype=torch.float64)).Q
        values = torch.logspace(0, -4, P, dtype=torch.float64) + 1e-4
        self.A = (Q * values @ Q.T).to(dtype)
        rough = Q + 0.05 * torch.randn(P, P, dtype=torch.float64)
        rough = torch.linalg.qr(rough).Q
        self.M = (rough / values @ rough.T).to(dtype)
        self.vectors = torch.randn(V, P, dtype=torch.float64).to(dtype)
        self.products = 0

    def product(self, vectors: Tensor) -> Tensor:
        self.products += len(vectors)
        return vectors @ self.A

    def solve(self, vectors: Tensor | None = None, start=None, **options):
        self.space = Subspace(self.vectors if vectors is None else vectors, start)
        return block_krylov(self.product, lambda v: v @ self.M, self.space, **options)

    def residuals(self, solutions: Tensor, vectors: Tensor | None = None) -> Tensor:
        vectors = self.vectors if vectors is None else vectors
        return (vectors - solutions @ self.A).norm(dim=1) / vectors.norm(dim=1)

    def start(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        basis = torch.linalg.qr(rows.T).Q.T.contiguous()
        return basis, basis @ self.A


def test_more_steps_come_closer_and_end_at_the_exact_solution():
    problem = Problem()
    exact = torch.linalg.solve(problem.A, problem.vectors.T).T
    energies = []
    for steps in (1, 2, 4, 8, 14):  # 14 >= P / V steps span everything
        result = problem.solve(max_steps=steps, tolerance=0.0)
        error = result.solutions - exact
        energies.append(torch.einsum("vp,pq,vq->v", error, problem.A, error))
        assert result.steps == steps
        torch.testing.assert_close(
            result.residuals, problem.residuals(result.solutions), rtol=1e-6, atol=1e-10
        )
    for before, after in pairwise(energies):
        assert (after <= before * (1 + 1e-9)).all()  # Galerkin: best in a growing space
    torch.testing.assert_close(result.solutions, exact, rtol=1e-7, atol=1e-7)


def test_solutions_that_are_worse_than_nothing_are_shortened():
    torch.manual_seed(3)
    problem = Problem()
    problem.vectors[0] = problem.A @ torch.ones(P, dtype=torch.float64)  # solved well beside the others
    problem.M = torch.diag(torch.logspace(0, 3, P, dtype=torch.float64))  # misleads
    plain = problem.solve(max_steps=1, tolerance=0.0)
    found = problem.solve(max_steps=1, tolerance=0.0, shorten=True)
    long = plain.residuals > 1
    assert 0 < int(long.sum()) == found.facts["shortened"] < V
    torch.testing.assert_close(found.solutions[~long], plain.solutions[~long])
    torch.testing.assert_close(found.residuals, problem.residuals(found.solutions), rtol=1e-6, atol=1e-10)
    assert (found.residuals <= 1).all()
    for lengths in (0.99, 1.01):  # no other length is better
        assert (problem.residuals(found.solutions * lengths) >= found.residuals)[long].all()


def test_it_stops_at_the_tolerance_and_counts_products():
    problem = Problem()
    problem.M = torch.linalg.inv(problem.A + 1e-3 * torch.eye(P).double())
    result = problem.solve(tolerance=1e-2, max_steps=50)
    assert result.residuals.max() <= 1e-2
    assert 1 <= result.steps < 14
    assert problem.products <= V * result.steps
    assert problem.solve(tolerance=1e-2, max_steps=result.steps - 1).residuals.max() > 1e-2


def test_an_exact_preconditioner_needs_one_step():
    problem = Problem()
    problem.M = torch.linalg.inv(problem.A)
    result = problem.solve(tolerance=1e-8)
    assert result.steps == 1
    assert problem.residuals(result.solutions).max() < 1e-8


def test_a_start_counts_for_nothing_and_is_used():
    problem = Problem()
    start = problem.start(torch.randn(15, P, dtype=torch.float64) @ problem.M)
    with_start = problem.solve(start=start, max_steps=1, tolerance=0.0)
    without = problem.solve(max_steps=1, tolerance=0.0)
    assert with_start.steps == without.steps == 1
    exact = torch.linalg.solve(problem.A, problem.vectors.T).T

    def energy(x: Tensor) -> Tensor:
        return torch.einsum("vp,pq,vq->v", x - exact, problem.A, x - exact)

    assert (energy(with_start.solutions) <= energy(without.solutions) * (1 + 1e-9)).all()
    done = problem.solve(start=start, max_steps=20, tolerance=1e-9)
    torch.testing.assert_close(done.solutions, exact, rtol=1e-5, atol=1e-5)


def test_a_start_that_holds_the_first_directions_is_not_the_end():
    problem = Problem()
    start = problem.start(problem.vectors @ problem.M)
    first = problem.solve(start=start, max_steps=0)
    assert first.steps == 0
    torch.testing.assert_close(first.solutions, problem.solve(max_steps=1).solutions, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(first.residuals, problem.residuals(first.solutions), rtol=1e-6, atol=1e-10)
    result = problem.solve(start=start, max_steps=20, tolerance=1e-8)
    assert problem.residuals(result.solutions).max() < 1e-7


def test_a_start_that_solves_needs_no_product():
    problem = Problem()
    exact = torch.linalg.solve(problem.A, problem.vectors.T).T
    result = problem.solve(start=problem.start(exact), tolerance=1e-8)
    assert (result.steps, problem.products) == (0, 0)
    torch.testing.assert_close(result.solutions, exact, rtol=1e-7, atol=1e-7)


def test_dependent_and_zero_right_hand_sides():
    problem = Problem()
    v = problem.vectors
    vectors = torch.stack([v[0], 2 * v[0], v[1], torch.zeros(P).double(), v[0] - v[1], v[2]])
    result = problem.solve(vectors, max_steps=14, tolerance=1e-10)
    exact = torch.linalg.solve(problem.A, vectors.T).T
    torch.testing.assert_close(result.solutions, exact, rtol=1e-6, atol=1e-6)
    assert not result.solutions[3].any()
    assert result.residuals[3] == 0
    assert problem.products <= P


def test_nothing_but_zeros():
    problem = Problem()
    result = problem.solve(torch.zeros(2, P, dtype=torch.float64))
    assert not result.solutions.any()
    assert result.residuals.tolist() == [0, 0]
    assert (result.steps, problem.products) == (0, 0)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_of_the_right_hand_sides_does_not_matter(scale):
    problem = Problem()
    plain = problem.solve(max_steps=3, tolerance=0.0)
    mixed = torch.tensor([1.0, scale, 1.0]).double()[:, None]
    scaled = problem.solve(problem.vectors * mixed, max_steps=3, tolerance=0.0)
    torch.testing.assert_close(scaled.solutions / mixed, plain.solutions, rtol=1e-6, atol=1e-6)


def test_tolerance_is_relative_to_each_right_hand_side():
    problem = Problem()
    vectors = problem.vectors * torch.tensor([1e-12, 1.0, 1e6]).double()[:, None]
    result = problem.solve(vectors, max_steps=20, tolerance=1e-6)
    assert problem.residuals(result.solutions, vectors).max() < 2e-6
    for scale in (1e-12, 1e9):
        scaled = problem.solve(problem.vectors * scale, max_steps=20, tolerance=1e-6)
        assert scaled.steps == problem.solve(max_steps=20, tolerance=1e-6).steps


def test_float32_reaches_its_precision():
    problem = Problem(torch.float32)
    result = problem.solve(max_steps=20, tolerance=1e-4)
    assert problem.residuals(result.solutions).max() < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_stay_orthonormal(dtype):
    """Over many steps from a start, with nearly dependent right-hand sides and a spectrum over 4 decades."""
    problem = Problem(dtype)
    few = torch.randn(6, P, dtype=torch.float64).to(dtype)
    problem.vectors = torch.cat([few, few[:2] * (1 + 1e-6) + 1e-5 * few[2:4]])
    rows = (torch.randn(5, P, dtype=torch.float64)).to(dtype)
    result = problem.solve(start=problem.start(rows), max_steps=12, tolerance=0.0)
    basis = problem.space.basis
    assert len(basis) > 30
    gram = basis.double() @ basis.double().T
    eps = torch.finfo(dtype).eps
    assert float((gram - torch.eye(len(gram)).double()).abs().max()) < 50 * eps
    torch.testing.assert_close(
        result.residuals, problem.residuals(result.solutions), rtol=1e-3, atol=1e4 * eps
    )
    assert result.facts["subspace"] == len(basis)


def test_solved_right_hand_sides_add_nothing():
    problem = Problem()
    _, eigenvectors = torch.linalg.eigh(problem.A)
    problem.M = torch.eye(P, dtype=torch.float64)
    problem.vectors = torch.cat([eigenvectors[:, :2].T, problem.vectors[:1]])  # two are solved by one step
    sizes = []

    def product(v):
        sizes.append(len(v))
        return problem.product(v)

    result = block_krylov(product, lambda v: v, Subspace(problem.vectors), max_steps=6, tolerance=1e-9)
    assert sizes == [3, 1, 1, 1, 1, 1]
    assert result.residuals[:2].max() <= 1e-9


def test_it_continues_from_an_earlier_subspace():
    problem = Problem()
    whole = problem.solve(max_steps=6, tolerance=0.0)
    first = problem.solve(max_steps=3, tolerance=0.0)
    subspace = problem.space.basis, problem.space.basis @ problem.A
    problem.products = 0
    idle = problem.solve(start=subspace, max_steps=0)
    torch.testing.assert_close(idle.solutions, first.solutions, rtol=1e-7, atol=1e-7)
    assert problem.products == 0
    second = problem.solve(start=subspace, max_steps=3, tolerance=0.0)
    torch.testing.assert_close(second.residuals, whole.residuals, rtol=1e-3, atol=1e-9)
    assert problem.products == 3 * V
