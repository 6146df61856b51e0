"""Bases that leave columns out, against the whole orthonormal matrices that they stand for."""

import pytest
import torch

from lightning_influence.model.layers.bases import Basis
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, rotate_matrices
from lightning_influence.model.layers.table_gradients import TableGradients

SEEN = torch.tensor([False, True, True, False, True, False, True])
NONE, DOUBLE = torch.zeros(7, dtype=torch.bool), torch.float64


def draw(groups, seen):
    torch.manual_seed(0)
    width = 7 if seen is None else int(seen.sum())
    return Basis.of_seen(torch.linalg.qr(torch.randn(groups, width, width, dtype=DOUBLE)).Q, seen)


def define(basis):
    """The matrix by its definition: unit vectors, and vectors that are zero outside of the columns seen."""
    if basis.seen is None:
        return basis.vectors
    whole = torch.eye(7, dtype=DOUBLE).repeat(len(basis.vectors), 1, 1)
    for group, vectors in enumerate(basis.vectors):
        for i, row in enumerate(basis.seen.nonzero().flatten().tolist()):
            for j, column in enumerate(basis.seen.nonzero().flatten().tolist()):
                whole[group, row, column] = vectors[i, j]
    return whole


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seen", [None, SEEN, NONE], ids=["whole", "part", "none"])
def test_products_with_a_basis(groups, seen):
    basis = draw(groups, seen)
    Q = define(basis)
    torch.testing.assert_close(basis.whole(), Q, rtol=0, atol=0)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(7, dtype=DOUBLE).expand_as(Q))
    rows, columns = torch.randn(3, groups, 4, 7, dtype=DOUBLE), torch.randn(3, groups, 7, 4, dtype=DOUBLE)
    for way, matrix in ((basis, Q), (basis.mT, Q.mT)):
        before = rows.clone(), columns.clone()
        torch.testing.assert_close(way.turn(rows), rows @ matrix)
        torch.testing.assert_close(way.turn_columns(columns), matrix.mT @ columns)
        torch.testing.assert_close((rows, columns), before, rtol=0, atol=0)
    covariance = rows[0].mT @ rows[0]
    expected = (Q.mT @ covariance @ Q).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(basis.energies(covariance), expected)
    single = basis.to(dtype=torch.float32)
    assert single.turn(rows.float()).dtype == torch.float32


@pytest.mark.parametrize("sides", ["in", "out", "both"])
def test_gradients_of_every_form_are_rotated(sides):
    inputs, outputs = draw(1, SEEN if sides != "out" else None), draw(1, SEEN if sides != "in" else None)
    products = FactoredGradients(
        torch.randn(1, 3, 2, 7, dtype=DOUBLE), torch.randn(2, 1, 3, 2, 7, dtype=DOUBLE)
    )
    tables = TableGradients(torch.randint(7, (3, 2)), torch.randn(2, 3, 2, 7, dtype=DOUBLE), products)
    for gradients in (products, DenseGradients(products.dense()), tables):
        expected = define(outputs).mT @ gradients.dense() @ define(inputs)
        torch.testing.assert_close(gradients.rotate(inputs, outputs).dense(), expected)
        torch.testing.assert_close(rotate_matrices(gradients.dense(), inputs, outputs), expected)
        alone = gradients.rotate(inputs, None)
        assert isinstance(alone, type(gradients))
        torch.testing.assert_close(alone.dense(), gradients.dense() @ define(inputs))
