import pytest
import torch

from lightning_influence.curvature.factors import Eigenbasis
from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.methods import weighted_squares as aggregated
from lightning_influence.methods import weighted_squares as squares
from lightning_influence.methods.weighted_squares import PreconditionedSquares
from lightning_influence.model.layers.gradients import FactoredGradients
from lightning_influence.model.layers.plan import Layout

SHAPES = {"wide": (1, 64, 65), "small": (1, 3, 4), "grouped": (2, 64, 65)}


class Problem:
    """Gradients whose energy is what the eigenvalues say."""

    def __init__(self):
        self.energies, layers = {}, {}
        for name, (groups, d_out, d_in) in SHAPES.items():
            rows, columns = (torch.logspace(0, -4, d, dtype=torch.float64) for d in (d_out, d_in))
            basis = Eigenbasis.of_vectors(
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
    monkeypatch.setattr(squares, "_SMALLEST", 1000)
    monkeypatch.setattr(aggregated, "_SMALL", 8)
    return Problem()


def relative(got, exact):
    return (got - exact).abs() / exact


@pytest.mark.parametrize("positions", [1, 3, 40])
def test_wide_layers_are_rotated_onto_few_vectors_within_the_tolerance(problem, positions):
    form = PreconditionedSquares(problem.inverse, tolerance=3e-2)
    batch = problem.draw(60, positions)
    errors = relative(form(batch), problem.exact(batch))[:, : 64 if positions == 1 else 16]  # confirmed
    p, q = form.kept["wide"]
    assert list(form.kept) == ["wide"]
    assert (p < 64, q < 65) == ((True, True) if positions == 1 else (False, True))
    assert 1e-9 < float(errors.square().mean().sqrt()) < 3e-2
    other = problem.draw(200, positions)  # not those it was chosen on
    assert float(relative(form(other), problem.exact(other)).square().mean().sqrt()) < 5e-2


def test_the_larger_side_is_cut_with_several_positions(problem):
    tall = EigenInverse(
        Eigenbasis.of_vectors(
            *(
                q.mT.contiguous().mT
                for q in (problem.energies["wide"][2].q_in, problem.energies["wide"][2].q_out)
            )
        ),
        problem.inverse.layers["wide"].eigenvalues,
        1e-3,
    )
    flipped = EigenInverse(
        Eigenbasis.of_vectors(tall.basis.q_out, tall.basis.q_in),
        tall.eigenvalues.mT.contiguous(),
        tall.damping,
    )
    layer = problem.draw(50, 3)["wide"]
    mirrored = FactoredGradients(layer.outputs[0], layer.inputs[None])
    form = PreconditionedSquares(
        BlockInverse(Layout({"wide": (1, 65, 64)}), {"wide": flipped}), tolerance=3e-2
    )
    got = form({"wide": mirrored})
    assert form.kept["wide"][0] < 65
    assert form.kept["wide"][1] == 64
    assert relative(got, tall.quadratic(layer)).max() < 0.1


def test_a_tighter_tolerance_keeps_more(problem):
    sizes = []
    for tolerance in (1e-1, 1e-2):
        form = PreconditionedSquares(problem.inverse, tolerance=tolerance)
        form(problem.draw(60))
        sizes.append(form.kept["wide"])
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
def test_without_tolerance_or_beyond_it_the_squares_are_exact(problem, tolerance):
    form = PreconditionedSquares(problem.inverse, tolerance=tolerance)
    for batch in (problem.draw(20), problem.draw(20, seeds=2), problem.draw(20, 3)):
        torch.testing.assert_close(form(batch), problem.exact(batch), rtol=1e-9, atol=0)
    assert not form.kept


def test_several_positions_or_seeds_after_one_are_exact_where_both_sides_are_cut(problem):
    form = PreconditionedSquares(problem.inverse, tolerance=3e-2)
    form(problem.draw(60))
    assert form.kept
    for batch in (problem.draw(10, positions=3), problem.draw(10, seeds=2)):
        torch.testing.assert_close(form(batch), problem.exact(batch), rtol=1e-9, atol=0)


def test_layers_without_gradients_add_nothing(problem):
    form = PreconditionedSquares(problem.inverse, tolerance=1e-2)
    batch = {"small": problem.draw(10)["small"]}
    torch.testing.assert_close(form(batch), problem.exact(batch), rtol=1e-9, atol=0)


def test_a_dominant_direction_does_not_drown_the_rest_in_single_precision():
    """Inputs with a large mean, as after a ReLU: norms are measured without it."""
    torch.manual_seed(1)
    columns, rows = torch.full((128,), 1e-4), torch.full((128,), 1.0)
    columns[0] = 1e6
    inverse = EigenInverse(
        Eigenbasis.of_vectors(*(torch.linalg.qr(torch.randn(1, 128, 128)).Q for _ in range(2))),
        rows[:, None] * columns.expand(1, 128, 128),
        1e-4,
    )
    inputs = (torch.randn(1, 50, 1, 128) * columns.sqrt()) @ inverse.basis.q_in[:, None].mT
    outputs = torch.randn(1, 1, 50, 1, 128) @ inverse.basis.q_out[:, None].mT
    batch = {"one": FactoredGradients(inputs, outputs)}
    form = PreconditionedSquares(
        BlockInverse(Layout({"one": (1, 128, 128)}), {"one": inverse}), tolerance=1e-2
    )
    got = form(batch)
    assert form.kept == {"one": (8, 8)}
    assert relative(got, inverse.quadratic(batch["one"])).max() < 1e-2


@pytest.mark.parametrize(("p", "q"), [(1, 1), (3, 5), (4, 2), (4, 5)])
def test_averages_are_right_on_average(p, q):
    torch.manual_seed(2)
    energy = torch.rand(1, 4, 5, dtype=torch.float64)
    energy[0, 3] = 0.0
    basis = Eigenbasis.of_vectors(*(torch.eye(d, dtype=torch.float64)[None] for d in (5, 4)))
    inverse = EigenInverse(basis, energy, 0.1)
    form = aggregated.Aggregation(inverse).at(p, q)
    rows, columns = (energy[0].sum(dim).argsort(descending=True) for dim in (1, 0))
    ordered = energy[0][rows][:, columns]
    used = torch.full((4, 5), float(form.rest), dtype=torch.float64)
    used[:p, q:], used[p:, :q], used[:p, :q] = form.row_rest[:, None], form.column_rest, form.kept
    assert float((used * ordered).sum()) == pytest.approx(float((inverse.weights * energy).sum()), rel=1e-12)
    torch.testing.assert_close(form.kept, inverse.weights[0][rows][:, columns][:p, :q])
