"""Which numbers of a gradient are kept: whitened coordinates, and their principal directions."""

import pytest
import torch

from lightning_influence.curvature.factors import Eigenbasis
from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.methods.kept_coordinates import choose_coordinates
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients
from lightning_influence.model.layers.plan import Layout

DOUBLE, B = torch.float64, 7
SHAPES = {"wide": (2, 3, 4), "narrow": (1, 5, 2)}


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def make_inverse(bases=True):
    layers = {}
    for seed, (name, (g, o, i)) in enumerate(SHAPES.items()):
        q_in, q_out = (torch.linalg.qr(draw(g, d, d, seed=seed)).Q for d in (i, o))
        basis = Eigenbasis.of_vectors(q_in, q_out if bases else None)
        layers[name] = EigenInverse(basis, draw(g, o, i, seed=seed + 9).exp(), 0.3)
    return BlockInverse(Layout(SHAPES), layers)


def make_gradients(positions=1):
    return {
        name: FactoredGradients(draw(g, B, positions, i, seed=3), draw(1, g, B, positions, o, seed=4))
        for name, (g, o, i) in SHAPES.items()
    }


@pytest.mark.parametrize("bases", [True, False], ids=["both sides", "a diagonal side"])
@pytest.mark.parametrize("positions", [1, 3])
def test_inner_products_are_those_of_the_inverse(positions, bases):
    inverse, gradients = make_inverse(bases), make_gradients(positions)
    dense = {name: DenseGradients(layer.dense()) for name, layer in gradients.items()}
    flat = torch.cat([layer.dense()[0].flatten(1) for layer in gradients.values()], dim=1)
    expected = inverse.apply(flat) @ flat.T
    for form in (gradients, dense):
        numbers, squares = choose_coordinates(inverse, 10**6).take(form)
        torch.testing.assert_close(numbers @ numbers.T, expected)
        torch.testing.assert_close(squares, expected.diagonal())
        few = choose_coordinates(inverse, 9)
        torch.testing.assert_close(few.take(form)[0], numbers[:, positions_of(few)])
        torch.testing.assert_close(few.take(form)[1], expected.diagonal())


def positions_of(kept):
    starts = dict(zip(SHAPES, (0, 24), strict=True))
    return torch.cat([places + starts[name] for name, places in kept.kept.items()])


def test_a_layer_that_took_no_part_counts_as_zero():
    kept, gradients = choose_coordinates(make_inverse(), 10**6), make_gradients()
    whole, squares = kept.take(gradients)
    blank = gradients["wide"].scaled(0.0)
    numbers, some = kept.take({"narrow": gradients["narrow"]})
    expected, part = kept.take({**gradients, "wide": blank})
    torch.testing.assert_close(numbers, expected)
    torch.testing.assert_close(some, part)
    assert bool((some < squares).all())
    assert whole.shape == numbers.shape


@pytest.mark.parametrize("rows", [5, 60], ids=["fewer examples", "more examples"])
@pytest.mark.parametrize("count", [3, 5, 8])
def test_directions_are_leading_singular_vectors(rows, count):
    kept = choose_coordinates(make_inverse(), 10**6)
    sample = draw(rows, kept.candidates) * torch.linspace(1, 3, kept.candidates)
    narrow = kept.narrow(sample, count)
    left = narrow.directions
    size = min(count, rows)
    assert left.shape == (kept.candidates, size)
    assert narrow.numbers == size
    torch.testing.assert_close(left.T @ left, torch.eye(size, dtype=DOUBLE))
    leading = torch.linalg.svd(sample).Vh[:size].T
    torch.testing.assert_close(left @ left.T, leading @ leading.T)
    whole, _ = kept.take(make_gradients())
    torch.testing.assert_close(narrow.take(make_gradients())[0], whole @ left)


@pytest.mark.parametrize("rows", [5, 60], ids=["fewer examples", "more examples"])
def test_directions_have_the_precision_of_the_coordinates(rows):
    kept = choose_coordinates(make_inverse(), 10**6)
    narrow = kept.narrow(draw(rows, kept.candidates).float(), 4)
    assert narrow.directions.dtype == torch.float32
    torch.testing.assert_close(narrow.directions.T @ narrow.directions, torch.eye(4))


def test_as_many_directions_as_examples_leave_out_nothing_of_them():
    kept, gradients = choose_coordinates(make_inverse(), 10**6), make_gradients(positions=3)
    whole, _ = kept.take(gradients)
    numbers, _ = kept.narrow(whole, B).take(gradients)
    torch.testing.assert_close(numbers @ numbers.T, whole @ whole.T)
