import math

import oracle
import pytest
import torch
from benchmarks import load_benchmark
from models import CASES
from scipy.linalg import subspace_angles

from lightning_influence.model.layers.plan import Layout
from lightning_influence.results.rendering import render_plain

DOUBLE = torch.float64
decomposition = load_benchmark("decomposition")
compare, diagonal_blocks = decomposition.compare, decomposition.diagonal_blocks
eigenbasis_overlap, eigenvalue_overlap = decomposition.eigenbasis_overlap, decomposition.eigenvalue_overlap
off_block_energy, relative_residual = decomposition.off_block_energy, decomposition.relative_residual


def symmetric(size, seed=0):
    root = torch.randn(size, size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / size


LAYOUT = Layout({"a": (1, 2, 3), "b": (2, 1, 2)})


def test_relative_residual():
    T, A = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 1.0], [1.0, 4.0]])
    assert relative_residual(T, A) == pytest.approx(math.sqrt(2) / 5)
    assert relative_residual(T, T) == 0
    assert relative_residual(T, torch.zeros(2, 2)) == 1
    assert relative_residual(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_residual(torch.zeros(2, 2), A) == math.inf


def test_off_block_energy():
    T = symmetric(10)
    owner = torch.tensor([0] * 6 + [1] * 4)
    blocks = torch.where(owner[:, None] == owner, T, 0)
    energy = off_block_energy(T, LAYOUT)
    assert energy == pytest.approx(float(((T - blocks) ** 2).sum() / (T**2).sum()))
    assert energy == pytest.approx(relative_residual(T, blocks) ** 2)
    assert off_block_energy(blocks, LAYOUT) == pytest.approx(0, abs=1e-14)
    found = diagonal_blocks(T, LAYOUT)
    assert torch.equal(found["a"], T[:6, :6])
    assert torch.equal(found["b"], T[6:, 6:])


def test_eigenvalue_overlap():
    truth = torch.tensor([3.0, 4.0, 0.0])
    assert eigenvalue_overlap(truth, truth.flip(0)) == 1
    assert eigenvalue_overlap(truth, torch.zeros(3)) == 0
    assert eigenvalue_overlap(truth, torch.tensor([0.0, 4.0, 2.0])) == pytest.approx(1 - 1 / 5)
    assert eigenvalue_overlap(truth, 3 * truth) == pytest.approx(-1)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_eigenbasis_overlap_is_the_mean_squared_cosine(k):
    T, A = symmetric(8), symmetric(8, 1)
    spaces = [torch.linalg.eigh(M).eigenvectors[:, -k:].numpy() for M in (T, A)]
    expected = float((torch.tensor(subspace_angles(*spaces)).cos() ** 2).mean())
    assert eigenbasis_overlap(T, A, k) == pytest.approx(expected)
    assert eigenbasis_overlap(T, 3 * T + torch.eye(8), k) == pytest.approx(1)
    assert eigenbasis_overlap(T, -T, k) == pytest.approx(1)  # leading by magnitude


@pytest.mark.parametrize("name", ["mlp_gelu", "mlp_relu_inplace_weighted", "conv2d_reflect_groups"])
def test_steps_of_the_ladder(name):
    """What each approximation keeps and loses: exact relations on models."""
    case = CASES[name]
    problem = (case.model, case.loss, case.x, case.y, case.layers)
    layout = Layout({layer: oracle.matrix_shape(case.model.get_submodule(layer)) for layer in case.layers})
    G = oracle.ggn(*problem)
    blocks = oracle.keep_blocks(G, case.model, case.layers)
    factors = oracle.layer_factors(*problem)
    ekfac = oracle.block_diagonal([f.ekfac() for f in factors.values()])
    kfac = oracle.block_diagonal([f.kfac() for f in factors.values()])

    found = compare(G, blocks, layout)
    assert found.residual == pytest.approx(math.sqrt(found.off_block))
    assert found.off_block > 0.01
    assert found.off_block_approximation == pytest.approx(0, abs=1e-14)
    for layer in found.layers:
        assert (layer.residual, layer.eigenvalues) == (0, 1)
        assert layer.eigenbasis == pytest.approx(1)

    for e, k in zip(compare(blocks, ekfac, layout).layers, compare(blocks, kfac, layout).layers, strict=True):
        assert 0 < e.residual <= k.residual + 1e-12
        assert 0 <= e.eigenbasis <= 1 + 1e-12
    assert compare(blocks, ekfac, layout).residual <= compare(blocks, kfac, layout).residual
    between = compare(ekfac, kfac, layout, k=10**6)  # one basis: only the eigenvalues differ
    for layer in between.layers:
        assert layer.k == layer.numel
        assert layer.eigenbasis == pytest.approx(1)
        assert layer.residual > 0


def test_it_prints_as_a_table():
    text = render_plain(compare(symmetric(10), symmetric(10, 1), LAYOUT))
    for part in ("relative residual", "off-block energy", "eigenbasis overlap", "a ", "b "):
        assert part in text


def test_what_is_refused():
    T = symmetric(10)
    with pytest.raises(ValueError, match=r"shapes \(10, 10\) and \(9, 9\); accepted are two square"):
        relative_residual(T, T[:9, :9])
    with pytest.raises(ValueError, match=r"shape \(9, 9\) for a layout of 10 parameters"):
        off_block_energy(T[:9, :9], LAYOUT)
    with pytest.raises(ValueError, match="accepted are two vectors of the same length"):
        eigenvalue_overlap(torch.ones(3), torch.ones(2))
    for k in (0, 11, True):
        with pytest.raises(ValueError, match=f"Got k={k}; accepted are integers from 1 to 10"):
            eigenbasis_overlap(T, T, k)
