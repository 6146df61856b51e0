import pytest
import torch
from drive import TIGHT

from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients
from lightning_influence.model.layers.plan import Layout

SHAPES = {"a": (1, 3, 2), "b": (2, 2, 4), "c": (1, 1, 5)}
K, B, V = 2, 3, 4


@pytest.fixture
def layout() -> Layout:
    return Layout(SHAPES)


@pytest.fixture
def gradients():
    """Given in another order than the layout's, and none for the last layer."""
    dense = DenseGradients(torch.randn(K, B, *SHAPES["b"], dtype=torch.float64))
    inputs = torch.randn(1, B, 2, 2, dtype=torch.float64)
    return {
        "b": dense,
        "a": FactoredGradients(inputs, torch.randn(K, 1, B, 2, 3, dtype=torch.float64)),
    }


def test_split_and_join_are_inverse(layout):
    flat = torch.randn(2, 3, layout.numel)
    blocks = layout.split(flat)
    assert {name: tuple(block.shape[2:]) for name, block in blocks.items()} == SHAPES
    assert torch.equal(layout.join(dict(reversed(blocks.items()))), flat)
    assert torch.equal(blocks["b"], flat[..., 6:22].reshape(2, 3, 2, 2, 4))
    assert torch.equal(layout.split(flat[0, 0])["c"], flat[0, 0, 22:].reshape(1, 1, 5))


def test_expand_puts_a_number_on_every_parameter_of_its_layer(layout):
    expected = [1.0] * 6 + [2.0] * 16 + [3.0] * 5
    assert layout.expand({"c": 3.0, "b": 2.0, "a": 1.0}, torch.zeros(1)).tolist() == expected


def test_flat_gradients_are_zero_where_a_layer_has_none(layout, gradients):
    flat = layout.dense(gradients)
    blocks = layout.split(flat)
    assert torch.equal(blocks["a"], gradients["a"].dense())
    assert torch.equal(blocks["b"], gradients["b"].dense())
    assert not blocks["c"].any()


def test_products_with_flat_vectors(layout, gradients):
    flat, vectors = layout.dense(gradients), torch.randn(V, layout.numel, dtype=torch.float64)
    torch.testing.assert_close(layout.dot(gradients, vectors), flat @ vectors.T, **TIGHT)
    weights, out = torch.randn(K, B, V, dtype=torch.float64), vectors.clone()
    layout.add_combination(out, gradients, weights)
    torch.testing.assert_close(out, vectors + torch.einsum("kbv,kbp->vp", weights, flat), **TIGHT)


def test_gradients_of_other_layers_only_are_refused(layout, gradients):
    with pytest.raises(KeyError, match=r"none of the layers \['a', 'b', 'c'\] has gradients"):
        layout.dense({"other": gradients["a"]})
