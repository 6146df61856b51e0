"""Products of long vectors against float64."""

import pytest
import torch

from lightning_influence.support.long_products import multiply_long


def draw(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, 4095, 4096, 20_000])
def test_every_term_is_in_the_sum(length):
    left, right = draw((3, length), 0), draw((length, 2), 1)
    torch.testing.assert_close(multiply_long(left, right), left @ right)


@pytest.mark.parametrize("shared", [True, False])
def test_leading_dimensions_stay(shared):
    left, right = draw((2, 4, 3, 9000), 0), draw((9000, 5) if shared else (2, 4, 9000, 5), 1)
    torch.testing.assert_close(multiply_long(left, right), left @ right)
    left = left.transpose(1, 2)
    if shared:
        torch.testing.assert_close(multiply_long(left, right), left @ right)


@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_of_something_is_nothing(sizes):
    """A process without examples, and a space without directions."""
    first, second, columns = sizes
    found = multiply_long(torch.ones(first, second, 9000), torch.ones(9000, columns))
    assert found.shape == sizes


def test_gradients_flow_as_through_a_product():
    left, right = draw((2, 9000), 0).requires_grad_(), draw((9000, 3), 1)
    (grad,) = torch.autograd.grad(multiply_long(left, right).square().sum(), left)
    (expected,) = torch.autograd.grad((left @ right).square().sum(), left)
    torch.testing.assert_close(grad, expected)


def test_a_large_term_among_a_million_costs_no_digits():
    left, right = draw((32, 1_000_000), 0).square(), draw((1_000_000, 8), 1).square()
    left[:, 100], right[100] = 1e3, 1e3
    exact = left @ right
    found = multiply_long(left.float(), right.float())
    assert float((found - exact).norm()) < 3e-6 * float(exact.norm())
