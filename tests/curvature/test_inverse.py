import oracle
import pytest
import torch
from drive import TIGHT, Setup, closed_form
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.curvature.factor_passes import CovariancePass, DiagonalPass
from lightning_influence.curvature.factors import Eigenbasis
from lightning_influence.curvature.inverse import BlockInverse, EigenInverse
from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients
from lightning_influence.model.layers.plan import Layout


def orthogonal(groups: int, size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(groups, size, size, dtype=torch.float64)).Q


def draw(groups: int, d_out: int, d_in: int, damping: float, with_basis: bool = True) -> EigenInverse:
    basis = Eigenbasis.of_vectors(orthogonal(groups, d_in), orthogonal(groups, d_out)) if with_basis else None
    return EigenInverse(basis, torch.rand(groups, d_out, d_in, dtype=torch.float64), damping)


def dense(inverse: EigenInverse) -> torch.Tensor:
    """The matrix that is inverted, from the definition."""
    groups = []
    for g, eigenvalues in enumerate(inverse.eigenvalues):
        Q = torch.eye(eigenvalues.numel(), dtype=torch.float64)
        if inverse.basis is not None:
            Q = torch.kron(inverse.basis.q_out[g].contiguous(), inverse.basis.q_in[g].contiguous())
        groups.append(Q @ torch.diag(eigenvalues.flatten() + inverse.damping) @ Q.T)
    return torch.block_diag(*groups)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    positions=st.integers(1, 6),
    seeds=st.integers(1, 3),
    damping=st.sampled_from([1e-3, 0.5]),
    with_basis=st.booleans(),
    seed=st.integers(0, 99),
)
def test_action_and_quadratic_form(shape, positions, seeds, damping, with_basis, seed):
    torch.manual_seed(seed)
    inverse = draw(*shape, damping, with_basis)
    matrix, (groups, d_out, d_in) = torch.linalg.inv(dense(inverse)), shape
    vectors = torch.randn(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(inverse.apply(vectors).flatten(1), vectors.flatten(1) @ matrix, **TIGHT)
    factored = FactoredGradients(
        torch.randn(groups, 2, positions, d_in, dtype=torch.float64),
        torch.randn(seeds, groups, 2, positions, d_out, dtype=torch.float64),
    )
    rows = factored.dense().flatten(2)
    one = factored.seeds(slice(0, 1))
    for gradients in (one, DenseGradients(one.dense())):
        torch.testing.assert_close(inverse.solve(gradients).flatten(1), rows[0] @ matrix, **TIGHT)
    expected = torch.einsum("kbp,pq,kbq->kb", rows, matrix, rows)
    for gradients in (factored, DenseGradients(factored.dense())):
        torch.testing.assert_close(inverse.quadratic(gradients), expected, **TIGHT)


def test_an_inverse_made_of_moments_is_that_of_their_eigenvalues():
    held = draw(2, 3, 4, 0.1)
    made = EigenInverse(held.basis, held.eigenvalues / 0.25, 0.1, unit=0.25)
    vectors = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    for one, other in ((made, held), (made.to(dtype=torch.float32), held.to(dtype=torch.float32))):
        given = vectors.to(one.moments.dtype)
        torch.testing.assert_close(one.apply(given), other.apply(given))
        torch.testing.assert_close(one.multiply(given), other.multiply(given))
    layout = Layout({"a": (2, 3, 4)})
    whole, again = (BlockInverse(layout, {"a": layer}).scaled(3.0) for layer in (held, made))
    torch.testing.assert_close(again.apply(vectors.flatten(1)), whole.apply(vectors.flatten(1)), **TIGHT)
    read = BlockInverse.from_state_dict(BlockInverse(layout, {"a": made}).state_dict())
    torch.testing.assert_close(read.layers["a"].eigenvalues, held.eigenvalues, **TIGHT)
    assert (EigenInverse(None, torch.tensor([[[-1e-9, 1.0]]]), 0.5, unit=2.0).eigenvalues >= 0).all()


def test_without_damping_it_is_a_pseudo_inverse():
    inverse = EigenInverse(None, torch.tensor([[[2.0, 0.0], [0.5, 0.0]]]), 0.0)
    assert inverse.weights.tolist() == [[[0.5, 0.0], [2.0, 0.0]]]


def test_blocks_of_a_whole_model():
    layout = Layout({"a": (1, 2, 3), "b": (2, 3, 2)})
    layers = {"a": draw(1, 2, 3, 0.1), "b": draw(2, 3, 2, 0.4)}
    whole = BlockInverse(layout, layers)
    assert whole.damping == {"a": 0.1, "b": 0.4}
    matrix = torch.linalg.inv(torch.block_diag(dense(layers["a"]), dense(layers["b"])))
    vectors = torch.randn(5, layout.numel, dtype=torch.float64)
    torch.testing.assert_close(whole.apply(vectors), vectors @ matrix, **TIGHT)
    gradients = {name: DenseGradients(block[None]) for name, block in layout.split(vectors).items()}
    expected = torch.einsum("bp,pq,bq->b", vectors, matrix, vectors)[None]
    torch.testing.assert_close(whole.quadratic(gradients), expected, **TIGHT)
    part = whole.quadratic({"b": gradients["b"]})  # a layer without gradients adds nothing
    torch.testing.assert_close(part, layers["b"].quadratic(gradients["b"]), **TIGHT)


def test_precision():
    single = draw(1, 2, 2, 0.1).to(dtype=torch.float32)
    assert single.weights.dtype == single.basis.q_in.dtype == torch.float32
    assert draw(1, 2, 2, 0.1, with_basis=False).to(dtype=torch.float32).basis is None


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_weights_are_positive_and_bounded_by_the_damping(damping):
    weights = draw(2, 3, 4, damping).weights
    assert weights.min() >= 0
    assert damping == 0 or weights.max() <= 1 / damping


def test_a_damping_below_rounding_is_none():
    inverse = draw(1, 3, 4, 0.0)
    inverse.eigenvalues[0, 1] = 0
    tiny = EigenInverse(inverse.basis, inverse.eigenvalues, 1e-33)
    torch.testing.assert_close(tiny.weights, inverse.weights, **TIGHT)
    assert (inverse.weights[0, 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-3, 1e-7, 1e-10])
def test_small_dampings_count(dtype, damping):
    """Eigenvalues of a layer spread over many orders of magnitude, and its damping follows their mean."""
    eigenvalues = torch.logspace(0, -12, 600, dtype=dtype)[None, None]
    weights = EigenInverse(None, eigenvalues, damping).weights
    torch.testing.assert_close(weights, 1 / (eigenvalues + damping))


SOME = ["mlp_relu_inplace_weighted", "conv2d_reflect_groups", "tokens"]


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize("name", SOME)
def test_multiplying_is_by_the_matrix_that_is_inverted(name, kind):
    setup = Setup.of(name)
    if kind == "diagonal":
        factors = setup.run(DiagonalPass(setup.plan, fisher="exact")).factors
        expected = torch.diag(torch.diagonal(setup.ggn()))
    else:
        factors = setup.run(CovariancePass(setup.plan, fisher="exact")).factors
        bases = {layer: factors.layers[f"model.{layer}"].basis for layer in setup.case.layers}
        found = oracle.layer_factors(
            *setup.problem, "exact", bases={key: (b.q_in, b.q_out) for key, b in bases.items()}
        )
        expected = oracle.block_diagonal([getattr(layer, kind)() for layer in found.values()])
    inverse = closed_form(factors, setup.layout, 0.3, kind)
    assert inverse.layout.numel == len(expected)
    eye = torch.eye(len(expected), dtype=torch.float64)
    torch.testing.assert_close(inverse.multiply(eye), expected, **TIGHT)
    vectors = torch.randn(3, len(expected), dtype=torch.float64)
    solved = inverse.apply(vectors)
    torch.testing.assert_close(inverse.multiply(solved) + 0.3 * solved, vectors, **TIGHT)
