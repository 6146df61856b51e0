import pytest
import torch

from lightning_influence.linalg.orthonormal import inner, orthonormalise

DTYPES = [torch.float32, torch.float64]


def gram(basis):
    return basis.double() @ basis.double().T


def test_inner_products_are_summed_in_float64():
    left, right = torch.randn(3, 70_000) + 3, torch.randn(2, 70_000) + 3
    torch.testing.assert_close(inner(left, right), left.double() @ right.double().T, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outside", [0, 4])
def test_basis_and_mixing(dtype, outside):
    space = torch.linalg.qr(torch.randn(50, outside, dtype=torch.float64)).Q.T.to(dtype)
    rows = torch.randn(6, 50, dtype=dtype) * torch.logspace(-6, 6, 6, dtype=dtype)[:, None]
    basis, mixing, shares = orthonormalise(rows.clone(), [space[:1], space[1:]] if outside else [])
    close = {"rtol": 0, "atol": 20 * torch.finfo(dtype).eps}
    torch.testing.assert_close(gram(basis), torch.eye(6, dtype=torch.float64), **close)
    torch.testing.assert_close(inner(basis, space), torch.zeros(6, outside, dtype=torch.float64), **close)
    rebuilt = mixing.double() @ rows.double() - shares.double() @ space.double()
    torch.testing.assert_close(rebuilt, basis.double(), rtol=0, atol=500 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dependent_is_left_out(dtype):
    rows = torch.randn(3, 7, dtype=dtype)
    rows = torch.cat([rows, rows[:1] + rows[1:2], torch.zeros(1, 7, dtype=dtype)])
    basis, _, _ = orthonormalise(rows.clone())
    assert basis.shape == (3, 7)
    torch.testing.assert_close((rows @ basis.T) @ basis, rows)
    assert len(orthonormalise(rows.clone(), [basis])[0]) == 0
    assert len(orthonormalise(rows[:0].clone(), [basis])[0]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearly_dependent_rows_give_an_orthonormal_basis(dtype):
    eps = torch.finfo(dtype).eps
    first = torch.randn(4, 30, dtype=torch.float64)
    rows = torch.cat([first, first + 30 * eps**0.5 * torch.randn(4, 30, dtype=torch.float64)]).to(dtype)
    basis, _, _ = orthonormalise(rows.clone())
    assert len(basis) == 8
    torch.testing.assert_close(gram(basis), torch.eye(8, dtype=torch.float64), rtol=0, atol=50 * eps)


def test_rows_are_measured_against_a_scale():
    rows = (
        torch.eye(3, 5, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64)[:, None]
    )
    for least, count in ((1e-2, 1), (1e-4, 2), (1e-7, 3)):
        assert len(orthonormalise(rows.clone(), scale=1.0, least=least)[0]) == count
    assert len(orthonormalise(rows.clone(), least=1e-2)[0]) == 3  # each against itself


def test_the_memory_is_that_of_the_vectors():
    rows = torch.randn(4, 100)
    basis, _, _ = orthonormalise(rows)
    assert basis.data_ptr() == rows.data_ptr()
