import pytest
import torch

from lightning_influence.factors.inverse import BlockInverse, EigenInverse
from lightning_influence.factors.statistics import Eigenbasis
from lightning_influence.layers.factored import FactoredGradients
from lightning_influence.layers.layout import Layout
from lightning_influence.solvers import squares
from lightning_influence.solvers.squares import PreconditionedSquares

SHAPES = {"wide": (1, 64, 65), "small": (1, 3, 4), "grouped": (2, 64, 65)}


class Problem:
    """Gradients whose energy is what the eigenvalues say, which no outer product reproduces."""

    def __init__(self):
        self.energies, layers = {}, {}
        for name, (groups, d_out, d_in) in SHAPES.items():
            rows, columns = (torch.logspace(0, -4, d, dtype=torch.float64) for d in (d_out, d_in))
            basis = Eigenbasis(
                *(torch.linalg.qr(torch.randn(groups, d, d, dtype=torch.float64)).Q for d in (d_in, d_out))
            )
            self.energies[name] = rows, columns, basis, groups
            noise = torch.rand(groups, d_out, d_in, dtype=torch.float64) + 0.5
            layers[name] = EigenInverse(basis, rows[:, None] * columns * noise, 1e-3)
        self.inverse = BlockInverse(Layout(SHAPES), layers)

    def draw(self, count, positions=1, seeds=1):
        result = {}
        for name, (rows, columns, basis, groups) in self.energies.items():
            a = torch.randn(groups, count, positions, len(columns), dtype=torch.float64) * columns.sqrt()
            d = torch.randn(seeds, groups, count, positions, len(rows), dtype=torch.float64) * rows.sqrt()
            result[name] = FactoredGradients(a @ basis.q_in[:, None].mT, d @ basis.q_out[:, None].mT)
        return result

    def exact(self, gradients):
        """From dense matrices and the inverse's action."""
        total = 0.0
        for name, layer in gradients.items():
            dense = layer.dense()
            solved = self.inverse.layers[name].apply(dense.flatten(0, 1)).view_as(dense)
            total = total + (dense * solved).sum(dim=(2, 3, 4))
        return total


@pytest.fixture
def problem(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(squares, "_RANK", 12)
    return Problem()


def test_low_rank_weights_serve_wide_layers_within_the_tolerance(problem):
    form = PreconditionedSquares(problem.inverse, tolerance=1e-2)
    assert not form.ranks
    first, second = problem.draw(50), problem.draw(50, seeds=2)
    torch.testing.assert_close(form(first), problem.exact(first), rtol=1e-9, atol=0)
    assert form.ranks == {"wide": 12}
    errors = form(second) / problem.exact(second) - 1
    assert 1e-9 < float(errors.square().mean().sqrt()) < 2e-2  # a form was used; others' error is alike


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
def test_without_tolerance_or_beyond_it_the_squares_are_exact(problem, tolerance):
    form = PreconditionedSquares(problem.inverse, tolerance=tolerance)
    for batch in (problem.draw(20), problem.draw(20, seeds=2)):
        torch.testing.assert_close(form(batch), problem.exact(batch), rtol=1e-9, atol=0)
    assert not form.ranks


def test_several_positions_are_exact_whatever_came_before(problem):
    form = PreconditionedSquares(problem.inverse, tolerance=1e-2)
    form(problem.draw(20))
    batch = problem.draw(10, positions=3)
    torch.testing.assert_close(form(batch), problem.exact(batch), rtol=1e-9, atol=0)


def test_layers_without_gradients_add_nothing(problem):
    form = PreconditionedSquares(problem.inverse, tolerance=1e-2)
    batch = {"small": problem.draw(10)["small"]}
    torch.testing.assert_close(form(batch), problem.exact(batch), rtol=1e-9, atol=0)
