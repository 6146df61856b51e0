import pytest
import torch
from finite_sums import FiniteSum

from lightning_influence.solvers.minibatch_noise import kappa, squares_from_batches


def forms(problem, directions):
    products = directions @ problem.rows.T
    squares = (products.square() * problem.rows.square().sum(dim=1)).mean(dim=1)
    return squares, products.square().mean(dim=1)


def test_kappa_is_reached_in_the_worst_direction_and_not_exceeded():
    problem = FiniteSum(N=200, P=8)
    trace = float(problem.H.trace())
    second = (problem.rows * problem.rows.square().sum(dim=1, keepdim=True)).T @ problem.rows / problem.N
    values, vectors = torch.linalg.eigh(problem.H)
    root = vectors / values.sqrt()
    worst = root @ torch.linalg.eigh(root.T @ second @ root).eigenvectors[:, -1:]
    directions = torch.cat([torch.randn(20, problem.P, dtype=torch.float64), worst.T])
    assert kappa(*forms(problem, directions), trace) == pytest.approx(problem.kappa)
    assert kappa(*forms(problem, directions[:-1]), trace) <= problem.kappa


def test_one_example_many_times():
    problem = FiniteSum(N=50, P=5)
    problem.rows = problem.rows[:1].expand(50, -1)
    problem.H = problem.rows.T @ problem.rows / 50
    assert kappa(*forms(problem, torch.randn(4, 5).double()), float(problem.H.trace())) == pytest.approx(1.0)


def test_nothing_to_tell_from():
    assert kappa(torch.zeros(3), torch.zeros(3), 0.0) == 1.0
    assert kappa(torch.zeros(0), torch.zeros(0), 1.0) == 1.0


def test_squares_from_batches_agree_with_those_of_examples():
    problem = FiniteSum(N=300, P=10, damping=0.0)
    directions = torch.randn(3, problem.P, dtype=torch.float64)
    squares, expected_forms = forms(problem, directions)
    found, found_forms = squares_from_batches(
        problem.product, problem.batch_product, directions, problem.N, batch=20, draws=600
    )
    torch.testing.assert_close(found_forms, (directions @ problem.H * directions).sum(dim=1))
    torch.testing.assert_close(found_forms, expected_forms)
    torch.testing.assert_close(found, squares, rtol=0.1, atol=0.0)
