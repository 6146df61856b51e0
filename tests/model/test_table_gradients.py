"""Gradients of tables in their own form against the matrices that they stand for."""

import pytest
import torch

from lightning_influence.curvature.factors import LayerStatistics
from lightning_influence.model.layers.bases import Basis
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, concatenate
from lightning_influence.model.layers.table_gradients import TableGradients, lay_out

B, V, D = 4, 11, 3
DOUBLE = torch.float64


def make(seeds, looked_up, mapped, examples=B, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    rows = torch.randint(0, V, (examples, looked_up), generator=generator)
    products = FactoredGradients(draw(1, examples, mapped, D), draw(seeds, 1, examples, mapped, V))
    return TableGradients(rows, draw(seeds, examples, looked_up, D), products)


@pytest.fixture(params=[(1, 6, 0), (1, 0, 5), (1, 7, 5), (3, 7, 5), (3, 12, 0), (2, 7, 1)])
def table(request):
    return make(*request.param)


def matrices(table):
    """The same from the definition, one row and one position at a time."""
    seeds, examples, looked_up, _ = table.values.shape
    result = torch.zeros(seeds, examples, 1, V, D, dtype=DOUBLE)
    for k in range(seeds):
        for b in range(examples):
            for r in range(looked_up):
                result[k, b, 0, table.rows[b, r]] += table.values[k, b, r]
            for s in range(table.products.inputs.shape[2]):
                result[k, b, 0] += torch.outer(
                    table.products.outputs[k, 0, b, s], table.products.inputs[0, b, s]
                )
    return result


def test_what_is_computed_in_this_form_is_that_of_the_matrices(table):
    dense = matrices(table)
    torch.testing.assert_close(table.dense(), dense)
    assert (table.num_seeds, table.num_examples, table.shape) == (len(dense), B, (1, V, D))
    vectors = torch.randn(5, 1, V, D, dtype=DOUBLE)
    products = torch.einsum("kbgoi,vgoi->kbv", dense, vectors)
    torch.testing.assert_close(table.dot(vectors), products)
    torch.testing.assert_close(table.dot(lay_out(vectors)), products)
    torch.testing.assert_close(lay_out(vectors), vectors)
    summed = torch.einsum("kbv,kbgoi->vgoi", products, dense)
    torch.testing.assert_close(table.combine(products), summed)
    torch.testing.assert_close(table.sum_of_squares(), dense.square().sum((0, 1)))
    weights = vectors[0].abs()
    torch.testing.assert_close(table.weighted_squares(weights), (dense.square() * weights).sum((2, 3, 4)))
    torch.testing.assert_close(table.squared_norms(), dense.square().sum((2, 3, 4)))
    basis = torch.linalg.qr(torch.randn(1, D, D, dtype=DOUBLE)).Q
    rotated = table.rotate(Basis(basis), None)
    assert isinstance(rotated, TableGradients)
    torch.testing.assert_close(rotated.dense(), dense @ basis)
    other = torch.linalg.qr(torch.randn(1, V, V, dtype=DOUBLE)).Q
    torch.testing.assert_close(table.rotate(Basis(basis), Basis(other)).dense(), other.mT @ dense @ basis)
    torch.testing.assert_close(table.scaled(2.0).seeds(slice(0, 1)).dense(), 2 * dense[:1])
    torch.testing.assert_close(table.select(torch.tensor([2, 0])).dense(), dense[:, [2, 0]])
    torch.testing.assert_close(table.to(dtype=torch.float32).dense(), dense.float())


@pytest.mark.parametrize(("seeds", "looked_up", "mapped"), [(1, 6, 0), (1, 7, 4), (1, 0, 5)])
def test_products_with_rows_of_a_basis_take_the_place_of_matrices(seeds, looked_up, mapped):
    table = make(seeds, looked_up, mapped)
    q_in, q_out = (torch.linalg.qr(torch.randn(1, d, d, dtype=DOUBLE)).Q for d in (D, V))
    for inner in (q_in, None):
        rotated = table.rotate(None if inner is None else Basis(inner), Basis(q_out))
        assert isinstance(rotated, FactoredGradients)
        assert rotated.inputs.shape[2] == looked_up + mapped
        dense = matrices(table) if inner is None else matrices(table) @ inner
        torch.testing.assert_close(rotated.dense(), q_out.mT @ dense)


@pytest.mark.parametrize(("seeds", "looked_up"), [(1, 6), (3, 8), (2, 11)])
def test_whole_moments_are_those_of_the_matrices(seeds, looked_up):
    table = make(seeds, looked_up, 0)
    dense = matrices(table)[:, :, 0]
    narrow, wide, total = table.whole_moments()
    torch.testing.assert_close(narrow[0], torch.einsum("kbvi,kbvj->ij", dense, dense))
    torch.testing.assert_close(wide[0], torch.einsum("kbvi,kbwi->vw", dense, dense))
    torch.testing.assert_close(total, dense.square().sum())


def test_whole_moments_of_what_takes_less_formed_are_left_to_the_matrices():
    assert make(1, 6, 1).whole_moments() is None
    assert make(1, V + 1, 0).whole_moments() is None
    for table in (make(2, 6, 1), make(2, V + 1, 0), make(2, 5, 0)):
        sums = [LayerStatistics.zeros((1, V, D), dtype=DOUBLE) for _ in range(2)]
        sums[0].add_covariances(table)
        sums[1].add_covariances(DenseGradients(table.dense()))
        for side in ("inputs", "outputs", "examples", "positions"):
            torch.testing.assert_close(getattr(sums[0], side), getattr(sums[1], side))


def test_second_moments_are_those_of_the_positions(table):
    narrow, wide = torch.zeros(1, D, D, dtype=DOUBLE), torch.zeros(1, V, dtype=DOUBLE)
    total = 0.0
    for k in range(table.num_seeds):
        seed = table.seeds(slice(k, k + 1))
        parts = [
            TableGradients(
                seed.rows[:, r : r + 1],
                seed.values[:, :, r : r + 1],
                seed.products.__class__(seed.products.inputs[:, :, :0], seed.products.outputs[:, :, :, :0]),
            )
            for r in range(seed.rows.shape[1])
        ]
        parts += [
            FactoredGradients(
                seed.products.inputs[:, :, s : s + 1], seed.products.outputs[:, :, :, s : s + 1]
            )
            for s in range(seed.products.inputs.shape[2])
        ]
        for part in parts:
            g = part.dense()[0, :, 0]
            narrow += torch.einsum("bvi,bvj->ij", g, g)
            wide += torch.einsum("bvi,bvi->v", g, g)
            total += float(g.square().sum())
    found = table.second_moments()
    torch.testing.assert_close(found[0], narrow)
    torch.testing.assert_close(found[1], wide)
    assert found[2] == pytest.approx(total)
    assert float(found[0][0].trace()) == pytest.approx(total)


def test_batches_of_other_sizes_are_joined_and_blanks_are_zero():
    parts = [make(1, 6, 0), make(1, 3, 5, examples=2, seed=1), make(1, 0, 2, examples=1, seed=2)]
    parts.append(parts[0].blank(3))
    joined = concatenate(parts)
    assert isinstance(joined, TableGradients)
    torch.testing.assert_close(joined.dense(), torch.cat([part.dense() for part in parts], dim=1))
    assert not joined.dense()[:, -3:].any()
    formed = concatenate([parts[0], DenseGradients(parts[1].dense())])
    torch.testing.assert_close(formed.dense(), joined.dense()[:, :6])


def test_a_part_of_the_table(table):
    rows = torch.tensor([1, 4, 5, 10])
    torch.testing.assert_close(table.restrict(rows).dense(), table.dense()[:, :, :, rows])


def test_absolute_values_do_not_cancel(table):
    ones = torch.ones(table.num_seeds, B, 1, dtype=DOUBLE)
    bound = table.absolute().combine(ones)
    assert bool((bound >= table.combine(ones).abs() - 1e-12).all())
    assert bool((bound >= 0).all())
