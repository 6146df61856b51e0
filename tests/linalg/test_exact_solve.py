import pytest
import torch
from drive import TIGHT

from lightning_influence.linalg.dense_solve import check_size, solve
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError


def matrix(size: int = 6, rank: int = 4) -> torch.Tensor:
    root = torch.randn(size, rank, dtype=torch.float64)
    return root @ root.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solution_and_residual(dtype):
    H, damping = matrix(), torch.rand(6, dtype=torch.float64) + 0.1
    vectors = torch.randn(3, 6, dtype=dtype)
    vectors[1] = 0
    solution, residual = solve(H, damping, vectors)
    expected = torch.linalg.solve(H + torch.diag(damping), vectors.double().T).T
    torch.testing.assert_close(solution, expected, **TIGHT)
    assert solution.dtype == torch.float64
    assert residual.shape == (3,)
    assert residual.max() < 1e-12


def test_an_indefinite_matrix_is_solved_too():
    H = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    solution, residual = solve(H, torch.full((3,), 0.5), torch.ones(1, 3))
    torch.testing.assert_close(solution, torch.tensor([[1 / 1.5, -1 / 1.5, 1 / 3.5]]).double())
    assert residual.max() < 1e-12


def test_a_singular_matrix_is_refused():
    with pytest.raises(NonFiniteError, match=r"singular at damping 0 to 0\. Use a positive damping"):
        solve(torch.zeros(3, 3), torch.zeros(3), torch.ones(1, 3))


def test_size():
    check_size(8192)
    with pytest.raises(UnsupportedModelError, match=r"dense 8,193 x 8,193 matrix \(0.5 GiB\); at most 8,192"):
        check_size(8193)
    with pytest.raises(UnsupportedModelError, match="at most 10 parameters"):
        check_size(11, 10)
