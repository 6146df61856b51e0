"""Matrices are cut to the smallest rank whose error is tolerated, even where rounding hides it."""

from __future__ import annotations

import pytest
import torch

from lightning_influence.linalg.truncation import truncate, truncate_within


def make_matrices(count, d_out, d_in, decay, dtype):
    """Matrices whose singular values fall by a factor, with bases of their own."""
    generator = torch.Generator().manual_seed(0)
    size = min(d_out, d_in)
    values = decay ** torch.arange(size, dtype=torch.float64)
    sides = [torch.randn(count, 1, d, size, generator=generator, dtype=torch.float64) for d in (d_out, d_in)]
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return ((left * values) @ right.mT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [0.1, 3e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_the_rank_is_the_smallest_whose_error_is_tolerated(shape, tolerance, dtype):
    matrices = make_matrices(5, *shape, 0.6, dtype)
    left, right = truncate_within(matrices, tolerance, min(shape))
    exact = matrices.double()

    def error(rank):
        values = torch.linalg.svdvals(exact)
        return float((values[..., rank:].square().sum() / exact.square().sum()).sqrt())

    found = float((exact - left.double() @ right.double().mT).norm() / exact.norm())
    rank = left.shape[-1]
    assert found <= 1.01 * tolerance
    assert error(rank) <= 1.01 * tolerance < error(rank - 2)  # a sketch may miss the best rank by one


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_ranks_that_are_not_enough_are_told(tolerance):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 1, 40, 40, generator=generator)
    assert truncate_within(noise, tolerance, 20) is None
    left, right = truncate_within(noise, tolerance, 40)
    assert 30 < left.shape[-1] <= 40
    assert (left @ right.mT - noise).norm() <= 1.01 * tolerance * noise.norm()


def test_a_matrix_of_zeros_has_rank_one():
    left, right = truncate_within(torch.zeros(2, 1, 6, 7), 1e-5, 3)
    assert left.shape == (2, 1, 6, 1)
    assert torch.equal(left @ right.mT, torch.zeros(2, 1, 6, 7))


def test_left_factors_are_orthonormal():
    left, right = truncate(make_matrices(3, 20, 30, 0.5, torch.float64), 4)
    torch.testing.assert_close(left.mT @ left, torch.eye(4, dtype=torch.float64).expand(3, 1, 4, 4))
    assert right.shape == (3, 1, 30, 4)
