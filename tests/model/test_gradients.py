import pytest
import torch
from drive import TIGHT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.model.layers import gradients as factored_module
from lightning_influence.model.layers.bases import Basis
from lightning_influence.model.layers.gradients import (
    DenseGradients,
    FactoredGradients,
    LayerGradients,
    concatenate,
    rotate_matrices,
)

SIZES = st.tuples(*(st.integers(1, 3) for _ in range(3)), *(st.integers(1, 4) for _ in range(3)))
FORMS = st.sampled_from(["factored", "dense", "chunked"])


@pytest.fixture(autouse=True)
def _whole_chunks(monkeypatch):
    monkeypatch.setattr(factored_module, "_CHUNK_BYTES", 32 * 2**20)


class Random:
    """Random gradients, in one of their forms, and their matrices from the definition."""

    def __init__(self, sizes: tuple[int, ...], form: str, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.K, self.G, self.R, self.B, self.O, self.I = sizes
        inputs = self.draw(self.G, self.B, self.R, self.I)
        outputs = self.draw(self.K, self.G, self.B, self.R, self.O)
        self.matrices = torch.einsum("kgbro,gbri->kbgoi", outputs, inputs)
        factored = FactoredGradients(inputs, outputs)
        self.gradients: LayerGradients = DenseGradients(self.matrices) if form == "dense" else factored
        # A working memory of one byte forces one vector, and one example, at a time.
        factored_module._CHUNK_BYTES = 1 if form == "chunked" else 32 * 2**20

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def check(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, **TIGHT)


@settings(deadline=None, max_examples=25)
@given(sizes=SIZES, form=FORMS, num=st.integers(1, 4), seed=st.integers(0, 99))
def test_contractions_are_their_definitions(sizes, form, num, seed):
    r = Random(sizes, form, seed)
    vectors, weights = r.draw(num, r.G, r.O, r.I), r.draw(r.K, r.B, num)
    assert r.gradients.num_examples == r.B
    check(r.gradients.dense(), r.matrices)
    check(r.gradients.dot(vectors), torch.einsum("kbgoi,vgoi->kbv", r.matrices, vectors))
    check(r.gradients.combine(weights), torch.einsum("kbgoi,kbv->vgoi", r.matrices, weights))
    check(r.gradients.sum_of_squares(), torch.einsum("kbgoi,kbgoi->goi", r.matrices, r.matrices))
    squares = torch.einsum("goi,kbgoi,kbgoi->kb", vectors[0], r.matrices, r.matrices)
    check(r.gradients.weighted_squares(vectors[0]), squares)


@pytest.mark.parametrize("form", ["factored", "chunked"])
@pytest.mark.parametrize(("seeds", "positions"), [(1, 2), (1, 5), (1, 7), (3, 7)])
def test_squares_are_the_same_by_pairs_of_positions_and_by_matrices(seeds, positions, form, monkeypatch):
    r = Random((seeds, 2, positions, 3, 4, 5), form, 0)
    expected = torch.einsum("kbgoi,kbgoi->goi", r.matrices, r.matrices)
    check(r.gradients.sum_of_squares(), expected)
    monkeypatch.setattr(factored_module, "_PRODUCT_BYTES", 1)
    for formed in (0, 100):  # forming matrices seems to cost nothing, or very much
        monkeypatch.setattr(factored_module, "_FORMED", formed)
        check(r.gradients.sum_of_squares(), expected)


@settings(deadline=None, max_examples=25)
@given(sizes=SIZES, form=FORMS, sides=st.sampled_from(["in", "out", "both", "none"]), seed=st.integers(0, 99))
def test_rotation(sizes, form, sides, seed):
    r = Random(sizes, form, seed)
    q_in, q_out = r.draw(r.G, r.I, r.I), r.draw(r.G, r.O, r.O)
    use_in, use_out = sides in {"in", "both"}, sides in {"out", "both"}
    expected = r.matrices
    if use_in:
        expected = torch.einsum("kbgoi,gij->kbgoj", expected, q_in)
    if use_out:
        expected = torch.einsum("gop,kbgoi->kbgpi", q_out, expected)
    sides = Basis(q_in) if use_in else None, Basis(q_out) if use_out else None
    check(r.gradients.rotate(*sides).dense(), expected)
    check(rotate_matrices(r.matrices, *sides), expected)


@settings(deadline=None, max_examples=25)
@given(sizes=SIZES, form=FORMS, seed=st.integers(0, 99))
def test_no_vectors_give_empty_results(sizes, form, seed):
    r = Random(sizes, form, seed)
    assert r.gradients.dot(r.draw(0, r.G, r.O, r.I)).shape == (r.K, r.B, 0)
    assert r.gradients.combine(r.draw(r.K, r.B, 0)).shape == (0, r.G, r.O, r.I)


@settings(deadline=None, max_examples=15)
@given(sizes=SIZES, form=FORMS, seed=st.integers(0, 99), factor=st.sampled_from([1.0, -2.5]))
def test_selection_scale_and_precision(sizes, form, seed, factor):
    r = Random(sizes, form, seed)
    index = torch.tensor([r.B - 1, 0])
    check(r.gradients.select(index).dense(), r.matrices[:, index])
    check(r.gradients.select(slice(1, None)).dense(), r.matrices[:, 1:])
    check(r.gradients.scaled(factor).dense(), factor * r.matrices)
    single = r.gradients.to(dtype=torch.float32)
    assert single.dense().dtype == torch.float32
    assert 2 * single.nbytes == r.gradients.nbytes
    assert r.gradients.to().dense().dtype == torch.float64


@pytest.mark.parametrize("forms", ["factored factored", "dense dense", "factored dense", "dense factored"])
@pytest.mark.parametrize("positions", [(1, 1), (3, 3), (1, 3)])
def test_concatenation_keeps_the_order(forms, positions):
    parts = [
        Random((2, 2, R, B, 3, 4), form, seed=R + B)
        for form, R, B in zip(forms.split(), positions, (3, 2), strict=True)
    ]
    joined = concatenate([part.gradients for part in parts])
    check(joined.dense(), torch.cat([part.matrices for part in parts], dim=1))
    factored = forms == "factored factored" and positions[0] == positions[1]
    assert isinstance(joined, FactoredGradients) is factored
    assert concatenate([joined]) is joined


@pytest.mark.parametrize("form", ["dense", "positions"])
def test_scores_of_wide_layers_keep_their_digits(form):
    """Long sums in float32: with one large term the others lose digits unless they are added up in blocks."""
    generator = torch.Generator().manual_seed(0)
    positions, width = 3, 600
    inputs = 0.1 + torch.rand(1, 8, positions, width, generator=generator)
    outputs = 0.1 + torch.rand(1, 1, 8, positions, width, generator=generator)
    inputs[..., 0], outputs[..., 0] = 1e2, 1e2
    factored = FactoredGradients(inputs, outputs)
    vectors = factored.dense()[0]
    gradients = DenseGradients(factored.dense()) if form == "dense" else factored
    exact = gradients.to(dtype=torch.float64).dot(vectors.double())
    assert float((gradients.dot(vectors) - exact).norm()) < 1e-6 * float(exact.norm())
