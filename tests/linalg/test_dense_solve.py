import pytest
import torch
from drive import TIGHT

from lightning_influence.linalg.dense_solve import BlockSolver, DenseSolver, check_size
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError


def matrix(size: int = 6, rank: int = 4) -> torch.Tensor:
    root = torch.randn(size, rank, dtype=torch.float64)
    return root @ root.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solution_and_residual(dtype):
    H, damping = matrix(), torch.rand(6, dtype=torch.float64) + 0.1
    vectors = torch.randn(3, 6, dtype=dtype)
    vectors[1] = 0
    solution, residual = DenseSolver(H, damping).solve(vectors)
    expected = torch.linalg.solve(H + torch.diag(damping), vectors.double().T).T
    torch.testing.assert_close(solution, expected, **TIGHT)
    assert solution.dtype == torch.float64
    assert residual.shape == (3,)
    assert residual.max() < 1e-12


def test_an_indefinite_matrix_is_solved_too():
    H = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    solution, residual = DenseSolver(H, torch.full((3,), 0.5)).solve(torch.ones(1, 3))
    torch.testing.assert_close(solution, torch.tensor([[1 / 1.5, -1 / 1.5, 1 / 3.5]]).double())
    assert residual.max() < 1e-12


def test_a_singular_matrix_is_refused():
    with pytest.raises(NonFiniteError, match=r"singular at damping 0 to 0\. Use a positive damping"):
        DenseSolver(torch.zeros(3, 3), torch.zeros(3)).solve(torch.ones(1, 3))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("signs", [1, -1])
def test_a_matrix_whose_rounding_hides_that_it_is_singular_is_refused(seed, signs):
    """Two equal inputs: factorisations go through, dividing by what rounding left."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(9, 30, dtype=torch.float64, generator=generator)
    root[3] = root[5]
    weights = torch.ones(30, dtype=torch.float64)
    weights[:10] *= signs
    H = (root * weights) @ root.T
    vectors = torch.randn(2, 9, dtype=torch.float64, generator=generator)
    with pytest.raises(NonFiniteError, match=r"singular at damping 0 to 0\. Use a positive damping"):
        DenseSolver(H, torch.zeros(9)).solve(vectors)
    with pytest.raises(NonFiniteError, match="singular at damping 0 to 0"):
        BlockSolver(
            [H[:4, :4], H[4:, 4:], H], [torch.arange(4), torch.arange(4, 9), torch.arange(9)], torch.zeros(9)
        ).solve(vectors)
    damped = DenseSolver(H, torch.full((9,), 1e-6))
    assert damped.smallest == pytest.approx(1e-6, rel=1e-3)
    assert damped.solve(vectors)[1].max() < 1e-6


def test_eigenvalues_that_the_matrix_was_not_summed_exactly_enough_for():
    H = torch.diag(torch.tensor([1.0, 0.5, 1e-8], dtype=torch.float64))
    DenseSolver(H, torch.zeros(3)).solve(torch.ones(1, 3))
    with pytest.raises(NonFiniteError, match=r"is about 1e-08, and up to 1e-07 they are rounding"):
        DenseSolver(H, torch.zeros(3), rounding=1e-7).solve(torch.ones(1, 3))
    told = DenseSolver(H, torch.full((3,), 1e-9), rounding=1e-7)  # as was asked for
    assert told.smallest < told.floor
    told.solve(torch.ones(1, 3))


def test_size():
    check_size(8192)
    with pytest.raises(UnsupportedModelError, match=r"dense 8,193 x 8,193 matrix \(0.5 GiB\); at most 8,192"):
        check_size(8193)
    with pytest.raises(UnsupportedModelError, match="at most 10 parameters"):
        check_size(11, 10)
