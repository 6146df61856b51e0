"""Limited-memory quasi-Newton steps, against the dense BFGS update and exact minima."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.linalg.descent import InverseHessian, descend


def quadratic(seed, size=8):
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(size, size, generator=generator, dtype=torch.float64)
    A = half @ half.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
    return A, torch.randn(size, generator=generator, dtype=torch.float64)


def bfgs(diagonal, pairs):
    """The inverse Hessian as a matrix, by the update of rank two (Nocedal & Wright 2006, 6.17)."""
    step, change = pairs[-1]
    H = torch.diag(diagonal) * (step @ change) / (change @ torch.diag(diagonal) @ change)
    for s, y in pairs:
        rho = 1 / (s @ y)
        left = torch.eye(len(s), dtype=s.dtype) - rho * torch.outer(s, y)
        H = left @ H @ left.T + rho * torch.outer(s, s)
    return H


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_product_is_that_of_the_dense_update(seed, count):
    A, v = quadratic(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    diagonal = 0.1 + torch.rand(8, generator=generator, dtype=torch.float64)
    inverse, pairs = InverseHessian(diagonal), []
    torch.testing.assert_close(inverse(v), diagonal * v)
    for _ in range(count):
        step = torch.randn(8, generator=generator, dtype=torch.float64)
        pairs.append((step, A @ step))
        assert inverse.learn(*pairs[-1])
    torch.testing.assert_close(inverse(v), bfgs(diagonal, pairs) @ v, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(inverse(pairs[-1][1]), pairs[-1][0], rtol=1e-8, atol=1e-10)


def test_only_positive_curvature_is_learned_and_only_inside():
    inverse = InverseHessian(torch.tensor([1.0, 1.0, 0.0]))
    assert not inverse.learn(torch.tensor([1.0, 0, 0]), torch.tensor([-1.0, 0, 0]))
    assert not inverse.learn(torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 5.0]))
    assert inverse.learn(torch.tensor([1.0, 0, 0]), torch.tensor([4.0, 0, 9.0]))
    assert inverse(torch.tensor([4.0, 0, 7.0])).tolist() == [1.0, 0.0, 0.0]
    for number in range(30):
        inverse.learn(torch.tensor([1.0, number, 0]), torch.tensor([1.0, number, 0]))
    assert len(inverse.pairs) == 10


@pytest.mark.parametrize("seed", range(5))
def test_a_quadratic_is_minimised_over_the_allowed_coordinates(seed):
    A, b = quadratic(seed)
    allowed = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    start = torch.full((8,), 0.5, dtype=torch.float64)

    def evaluate(x):
        return float(x @ A @ x / 2 - b @ x), A @ x - b

    found = descend(evaluate, start, allowed.double(), most=60, least_fall=0.0)
    expected = start.clone()
    right = (b - A @ (start * ~allowed))[allowed]
    expected[allowed] = torch.linalg.solve(A[allowed][:, allowed], right)
    torch.testing.assert_close(found.point, expected, rtol=1e-5, atol=1e-6)
    assert found.objective == evaluate(found.point)[0] < evaluate(start)[0]


def test_what_was_seen_on_the_way_is_learned():
    A = torch.diag(torch.tensor([9.0, 9.0], dtype=torch.float64))

    def evaluate(x):
        return float(x @ A @ x / 2), A @ x

    before, start = (torch.tensor(point, dtype=torch.float64) for point in ([3.0, 3.0], [2.0, 2.0]))
    ones = torch.ones(2, dtype=torch.float64)
    learned = [(before, evaluate(before)[1])]
    found = descend(evaluate, start, ones, most=1, least_fall=0.0, learned=learned)
    torch.testing.assert_close(found.point, torch.zeros(2, dtype=torch.float64))
    assert (found.lengths, found.evaluations) == ([1.0], 2)
    assert descend(evaluate, start, ones, most=1, least_fall=0.0).lengths[0] < 1


def test_steps_into_what_is_not_finite_are_shortened():
    def evaluate(x):
        value = float(x)
        return None if value <= 0 else (value - math.log(value), 1 - 1 / x)

    found = descend(evaluate, torch.tensor([9.0]), torch.tensor([90.0]), most=30, least_fall=0.0)
    assert float(found.point) == pytest.approx(1, abs=1e-3)
    stuck = descend(lambda x: None, torch.ones(1), torch.ones(1), most=3, least_fall=0.0)
    assert (stuck.objective, stuck.lengths) == (math.inf, [])


def test_the_end_is_where_three_steps_no_longer_pay():
    A = torch.diag(torch.logspace(-3, 0, 30, dtype=torch.float64))

    def evaluate(x):
        return 1.0 + float(x @ A @ x), 2 * A @ x

    ones = torch.ones(30, dtype=torch.float64)
    values = []
    for most in range(1, 12):
        found = descend(evaluate, ones, ones, most=most, least_fall=0.05)
        if len(found.lengths) < most:
            break
        values.append(found.objective)
    whole = [1.0 + float(A.sum()), *values]
    assert 3 <= len(values) < 11
    assert whole[-1] > 0.95 * whole[-4]
    assert all(now <= 0.95 * whole[i] for i, now in enumerate(whole[3:-1]))


def test_a_minimum_is_left_alone():
    found = descend(lambda x: (0.0, torch.zeros(2)), torch.ones(2), torch.ones(2), most=5, least_fall=0.1)
    assert (found.point.tolist(), found.lengths) == ([1.0, 1.0], [])
