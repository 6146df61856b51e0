import pytest
import torch
from drive import TIGHT
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.curvature.eigenbases import compute_eigenbasis
from lightning_influence.curvature.factors import (
    Eigenbasis,
    Factors,
    LayerStatistics,
    fingerprint,
    fingerprint_differs,
    rotate,
)
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients
from lightning_influence.support.errors import FactorMismatchError, NonFiniteError

SIZES = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)
)


def draw(K: int, G: int, R: int, O: int, I: int, B: int = 3) -> FactoredGradients:
    inputs = torch.randn(G, B, R, I, dtype=torch.float64)
    return FactoredGradients(inputs, torch.randn(K, G, B, R, O, dtype=torch.float64))


@settings(deadline=None, max_examples=25)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_sums_and_averages(sizes, seed):
    torch.manual_seed(seed)
    parts = [draw(*sizes, B=B) for B in (3, 1, 2)]
    _, G, R, O, I = sizes
    sums = LayerStatistics.zeros((G, O, I), dtype=torch.float64)
    assert sums.shape == (G, O, I)
    assert sums.second_moment() is None
    for part in parts:
        sums.add_covariances(part)
    inputs = torch.cat([part.inputs for part in parts], dim=1)
    outputs = torch.cat([part.outputs for part in parts], dim=2)
    A = torch.einsum("gbri,gbrj->gij", inputs, inputs) / (6 * R)
    S = torch.einsum("kgbro,kgbrp->gop", outputs, outputs) / 6
    torch.testing.assert_close(sums.covariance_in(), A, **TIGHT)
    torch.testing.assert_close(sums.covariance_out(), S, **TIGHT)
    assert (sums.examples, sums.positions) == (6, 6 * R)
    basis = compute_eigenbasis("layer", sums)
    sums.set_basis(basis)
    for i, part in enumerate(parts):
        sums.add_squares(DenseGradients(part.dense()) if i % 2 else part)
    matrices = torch.einsum("kgbro,gbri->kbgoi", outputs, inputs)
    rotated = torch.einsum("gop,kbgoi,gij->kbgpj", basis.q_out, matrices, basis.q_in)
    torch.testing.assert_close(sums.second_moment(), rotated.square().sum((0, 1)) / 6, **TIGHT)
    # A rotation changes no norm: the sum of the eigenvalues is the trace of the block.
    trace = matrices.square().sum() / 6
    torch.testing.assert_close(sums.second_moment().sum(), trace, **TIGHT)
    sums.set_basis(basis)
    assert sums.second_moment() is None
    assert sums.squares_examples == 0


@settings(deadline=None, max_examples=25)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_rotation_is_the_same_by_factors_and_by_matrices(sizes, seed):
    torch.manual_seed(seed)
    gradients, (_, G, _, O, I) = draw(*sizes), sizes
    basis = Eigenbasis.of_vectors(
        torch.randn(G, I, I, dtype=torch.float64), torch.randn(G, O, O, dtype=torch.float64)
    )
    expected = torch.einsum("gop,kbgoi,gij->kbgpj", basis.q_out, gradients.dense(), basis.q_in)
    torch.testing.assert_close(rotate(gradients, basis).dense(), expected, **TIGHT)
    torch.testing.assert_close(rotate(DenseGradients(gradients.dense()), basis).dense(), expected, **TIGHT)


def test_rotation_takes_the_cheaper_form():
    basis = Eigenbasis.of_vectors(torch.eye(4)[None], torch.eye(3)[None])
    assert isinstance(rotate(draw(1, 1, 1, 3, 4).to(dtype=torch.float32), basis), FactoredGradients)
    assert isinstance(rotate(draw(1, 1, 50, 3, 4).to(dtype=torch.float32), basis), DenseGradients)


def test_the_basis_is_decomposed_in_float64_and_kept_in_the_precision_of_the_sums():
    sums = LayerStatistics.zeros((1, 3, 4))
    sums.add_covariances(draw(1, 1, 2, 3, 4).to(dtype=torch.float32))
    basis = compute_eigenbasis("layer", sums)
    assert basis.q_in.dtype == torch.float32
    identity = basis.q_in[0].T @ basis.q_in[0]
    torch.testing.assert_close(identity, torch.eye(4), rtol=0, atol=3e-7)  # float32 rounding of the columns
    assert basis.to(dtype=torch.float64).q_out.dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 40])
def test_wide_covariances_are_told_by_their_upper_triangle(rows):
    torch.manual_seed(0)
    sums, seen = LayerStatistics.zeros((2, 515, 700), dtype=torch.float64), []
    for _ in range(2):
        inputs, outputs = (torch.randn(2, rows, d, dtype=torch.float64) for d in (700, 515))
        sums.add_rows(inputs, outputs, rows, rows)
        seen.append((inputs, outputs))
    for side, found in enumerate((sums.covariance_in(), sums.covariance_out())):
        joined = torch.cat([pair[side] for pair in seen], dim=1)
        torch.testing.assert_close(found, joined.mT @ joined / (2 * rows))


def test_empty_sums_average_to_zero():
    sums = LayerStatistics.zeros((2, 3, 4))
    assert not sums.covariance_in().any()
    assert not sums.covariance_out().any()


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_covariances_that_are_not_finite_are_refused_by_name(side, value):
    sums = LayerStatistics.zeros((1, 2, 2))
    sums.examples = 5
    getattr(sums, side)[0, 0, 0] = value
    which = {"inputs": "input", "outputs": "output-gradient"}[side]
    with pytest.raises(
        NonFiniteError, match=rf"The {which} covariance of layer 'enc.fc' is not finite after 5"
    ):
        compute_eigenbasis("enc.fc", sums)


@pytest.fixture
def factors() -> Factors:
    layers = {}
    for name, shape in {"a": (1, 2, 3), "b": (2, 3, 2)}.items():
        layers[name] = LayerStatistics.zeros(shape, dtype=torch.float64)
        gradients = draw(2, shape[0], 2, shape[1], shape[2])
        layers[name].add_covariances(gradients)
        if name == "a":
            layers[name].set_basis(compute_eigenbasis(name, layers[name]))
            layers[name].add_squares(gradients)
    return Factors(layers, "exact", 6.0, 3.0, "fit", {"a.weight": [1.0, 2.0]})


def test_state_is_complete(factors):
    back = Factors.from_state_dict(factors.state_dict())
    assert back.state_dict().keys() == factors.state_dict().keys()
    for key, value in factors.state_dict().items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, back.state_dict()[key]), key
    assert not back.has_squares
    assert back.mean_weight == 2
    assert factors.to(dtype=torch.float32).layers["a"].squares.dtype == torch.float32
    assert Factors().mean_weight == 1
    assert not Factors().has_squares


def test_state_of_another_version_is_refused(factors):
    with pytest.raises(FactorMismatchError, match="have version 0, this library reads version 1"):
        Factors.from_state_dict({**factors.state_dict(), "version": 0})


def test_factors_of_another_model_are_refused(factors):
    factors.check_fits({"b": (2, 3, 2), "a": (1, 2, 3)})
    with pytest.raises(
        FactorMismatchError,
        match=r"a: factors \(1, 2, 3\), model \(1, 2, 4\); b: .*, model missing; c: factors missing",
    ):
        factors.check_fits({"a": (1, 2, 4), "c": (1, 1, 1)})


def test_fingerprint_notices_other_weights():
    net = torch.nn.Linear(3, 2)
    stored = fingerprint(net)
    assert fingerprint_differs(stored, net) == []
    assert fingerprint_differs({}, net) == []
    with torch.no_grad():
        net.weight[0, 0] += 1e-3
    assert fingerprint_differs(stored, net) == ["weight"]
    assert fingerprint_differs(stored, torch.nn.Linear(3, 2, bias=False)) == ["bias", "weight"]


def test_factors_print_what_they_are_of():
    assert repr(Factors()) == "Factors(0 layers, mixed Fisher, 0 examples, without eigenvalues, from a pass)"
    layer = LayerStatistics(torch.zeros(1, 3, 3), torch.zeros(1, 2, 2), examples=5.0, positions=5.0)
    some = Factors({"a": layer}, weight_examples=5.0, origin="fit")
    assert repr(some) == "Factors(1 layer, mixed Fisher, 5 examples, without eigenvalues, from a fit)"
