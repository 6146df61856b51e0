"""Answers of low rank are those of the dense inverse, cut as a singular value decomposition would."""

import pytest
import torch
from drive import closed_form
from test_two_level import DAMPING, SOME, Problem

from lightning_influence.curvature import low_rank_matrices
from lightning_influence.curvature.compact_solving import pick_columns, solve_in_rank, solve_within
from lightning_influence.curvature.factors import Eigenbasis
from lightning_influence.curvature.inverse import EigenInverse
from lightning_influence.curvature.low_rank_matrices import DenseMatrices, LowRankMatrices
from lightning_influence.model.layers.bases import Basis
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients
from lightning_influence.model.layers.table_gradients import TableGradients

DOUBLE = torch.float64


def cut(whole: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


@pytest.mark.parametrize("name", SOME)
def test_ranks_cut_what_the_inverse_gives(name):
    p = Problem(name)
    inverse = closed_form(p.factors, p.setup.layout, DAMPING)
    for layer, gradients in p.train.items():
        whole = inverse.layers[layer].apply(gradients.dense()[0])
        exact = solve_in_rank(inverse.layers[layer], gradients, 99, DOUBLE)
        torch.testing.assert_close(exact.dense(), whole, rtol=1e-9, atol=1e-12)
        same = solve_within(inverse.layers[layer], gradients, 0.0, DOUBLE)
        torch.testing.assert_close(same.dense(), whole, rtol=1e-12, atol=0)
        one = solve_in_rank(inverse.layers[layer], gradients, 1, DOUBLE)
        if isinstance(one, LowRankMatrices):
            best = (cut(whole, 1) - whole).flatten(1).norm(dim=1)
            assert ((one.dense() - whole).flatten(1).norm(dim=1) <= 1.1 * best + 1e-12).all()


@pytest.mark.parametrize("tolerance", [0.5, 0.05, 1e-4])
@pytest.mark.parametrize("positions", [1, 3])
def test_the_error_is_tolerated_and_the_rank_is_about_the_smallest(tolerance, positions):
    torch.manual_seed(3)
    d_out, d_in, count = 24, 40, 7
    eigenvalues = torch.logspace(0, -4, d_out, dtype=DOUBLE)[:, None] * torch.logspace(
        0, -3, d_in, dtype=DOUBLE
    )
    basis = Eigenbasis.of_vectors(
        *(torch.linalg.qr(torch.randn(1, d, d, dtype=DOUBLE)).Q for d in (d_in, d_out))
    )
    inverse = EigenInverse(basis, eigenvalues[None], 1e-3)
    gradients = FactoredGradients(
        torch.randn(1, count, positions, d_in, dtype=DOUBLE),
        torch.randn(1, 1, count, positions, d_out, dtype=DOUBLE),
    )
    whole = inverse.apply(gradients.dense()[0])
    found = solve_within(inverse, gradients, tolerance, DOUBLE)

    def error(matrices: torch.Tensor) -> float:
        relative = (matrices - whole).flatten(1).square().sum(1) / whole.flatten(1).square().sum(1)
        return float(relative.mean().sqrt())

    assert error(found.dense()) <= tolerance
    most = (d_out * d_in - 1) // (d_out + d_in)
    needed = next(r for r in range(1, d_out + 1) if error(cut(whole, r)) <= 0.95 * tolerance)
    if needed <= most:
        assert isinstance(found, LowRankMatrices)
        assert found.rank <= needed + 1
    else:
        assert isinstance(found, DenseMatrices)


def test_rows_of_tables_are_solved_alone():
    torch.manual_seed(4)
    vocabulary, width, count, positions = 50, 12, 4, 3
    nothing = FactoredGradients(
        torch.zeros(1, count, 0, width, dtype=DOUBLE), torch.zeros(1, 1, count, 0, vocabulary, dtype=DOUBLE)
    )
    rows = torch.randint(vocabulary, (count, positions))
    table = TableGradients(rows, torch.randn(1, count, positions, width, dtype=DOUBLE), nothing)
    q_in = torch.linalg.qr(torch.randn(1, width, width, dtype=DOUBLE)).Q
    basis = Eigenbasis.of_vectors(q_in, None)
    inverse = EigenInverse(basis, torch.rand(1, vocabulary, width, dtype=DOUBLE), 0.1)
    whole = inverse.apply(table.dense()[0])
    for found in (
        solve_in_rank(inverse, table, 3, DOUBLE),
        solve_within(inverse, table, 1e-6, DOUBLE),
        solve_in_rank(inverse, DenseGradients(table.dense()), 3, DOUBLE),
    ):
        torch.testing.assert_close(found.dense(), whole, rtol=1e-5, atol=1e-6)
        assert isinstance(found, LowRankMatrices)
        assert found.rank <= 3


@pytest.mark.parametrize("kept", [1, 10, 40])
@pytest.mark.parametrize("positions", [1, 3])
def test_columns_of_zeros_are_left_out_and_change_nothing(kept, positions):
    """Of gradients that show few columns, and of a basis that holds vectors of few."""
    torch.manual_seed(5)
    d_out, d_in, count = 24, 40, 7
    seen = torch.zeros(d_in, dtype=torch.bool)
    seen[torch.randperm(d_in)[:kept]] = True
    q_out = torch.linalg.qr(torch.randn(1, d_out, d_out, dtype=DOUBLE)).Q
    part = Basis.of_seen(torch.linalg.qr(torch.randn(1, kept, kept, dtype=DOUBLE)).Q, seen)
    eigenvalues = (
        torch.rand(1, d_out, d_in, dtype=DOUBLE) * torch.logspace(0, -4, d_out, dtype=DOUBLE)[:, None]
    )
    inputs = torch.randn(1, count, positions, d_in, dtype=DOUBLE) * seen
    gradients = FactoredGradients(inputs, torch.randn(1, 1, count, positions, d_out, dtype=DOUBLE))
    picked, columns = pick_columns(gradients)
    assert (columns is None) == (kept == d_in)
    assert columns is None or columns.tolist() == seen.nonzero().flatten().tolist()
    assert picked.shape[2] == kept
    inverse = EigenInverse(Eigenbasis(part, Basis(q_out)), eigenvalues, 1e-3)
    plain = EigenInverse(Eigenbasis.of_vectors(part.whole(), q_out), eigenvalues, 1e-3)
    whole = plain.apply(gradients.dense()[0])
    formed = DenseGradients(gradients.dense())  # whose columns are not looked at
    for rank in (1, 3):
        found, expected = (
            solve_in_rank(inverse, gradients, rank, DOUBLE),
            solve_in_rank(plain, formed, rank, DOUBLE),
        )
        assert type(found) is type(expected)
        best = (cut(whole, rank) - whole).norm()
        for answer in (found, expected):
            assert float((answer.dense() - whole).norm()) <= 1.1 * float(best) + 1e-9
    for tolerance in (0.3, 1e-3, 1e-9):
        found, expected = (
            solve_within(way, some, tolerance, DOUBLE)
            for way, some in ((inverse, gradients), (plain, formed))
        )
        assert type(found) is type(expected)
        relative = (found.dense() - whole).flatten(1).square().sum(1) / whole.flatten(1).square().sum(1)
        assert float(relative.mean().sqrt()) <= tolerance + 1e-12
    # One example that shows another column brings it in for the others, which are zero there.
    other = ~seen
    if other.any():
        more = inputs.clone()
        more[0, 0, 0, other.nonzero()[0]] = 2.0
        gradients = FactoredGradients(more, gradients.outputs)
        exact = solve_within(inverse, gradients, 1e-10, DOUBLE).dense()
        torch.testing.assert_close(exact, plain.apply(gradients.dense()[0]), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize(("columns", "cached"), [(1, 1), (4, 1), (5, 2**10), (2**9, 2**21)])
def test_products_are_the_same_a_few_columns_and_examples_at_a_time(columns, cached, positions, monkeypatch):
    torch.manual_seed(6)
    monkeypatch.setattr(low_rank_matrices, "_COLUMNS", columns)
    monkeypatch.setattr(low_rank_matrices, "_CACHED_BYTES", cached)
    gradients = FactoredGradients(
        torch.randn(2, 5, positions, 9, dtype=DOUBLE), torch.randn(3, 2, 5, positions, 7, dtype=DOUBLE)
    )
    matrices = LowRankMatrices(torch.randn(6, 2, 7, 2, dtype=DOUBLE), torch.randn(6, 2, 9, 2, dtype=DOUBLE))
    expected = torch.einsum("kbgoi,vgoi->kbv", gradients.dense(), matrices.dense())
    torch.testing.assert_close(matrices._dot_factors(gradients), expected)
    torch.testing.assert_close(matrices.dot(gradients), expected)


@pytest.mark.parametrize(("d_out", "d_in"), [(7, 9), (7, 1)])
def test_mixtures_are_sums_of_the_matrices(d_out, d_in):
    torch.manual_seed(8)
    left, right = torch.randn(6, 2, d_out, 2, dtype=DOUBLE), torch.randn(6, 2, d_in, 2, dtype=DOUBLE)
    matrices, weights = LowRankMatrices(left, right), torch.randn(3, 6, dtype=DOUBLE)
    expected = torch.einsum("qv,vgor,vgir->qgoi", weights, left, right)
    torch.testing.assert_close(matrices.mix(weights), expected)
    assert matrices.mix(weights[:0]).shape == (0, 2, d_out, d_in)
