"""method='block_ggn' by tensor, and estimates of the Fisher in dense methods."""

from __future__ import annotations

import oracle
import pytest
import torch
from influence_cases import CLOSE, DAMPING, Asked, gradients
from models import CASES

SOME = ["mlp_relu_inplace_weighted", "conv2d_reflect_groups", "mlp_tanh_no_bias"]


@pytest.mark.parametrize("name", SOME)
def test_blocks_of_tensors(name):
    case = CASES[name]
    G = oracle.ggn(case.model, case.loss, case.x, case.y, case.layers)
    pieces = []  # number of each coordinate's tensor
    for i, layer in enumerate(oracle.find_block(case.model, name) for name in case.layers):
        row = [2 * i] * layer.weight[0].numel() + [2 * i + 1] * (layer.bias is not None)
        pieces += row * layer.weight.shape[0]
    owner = torch.tensor(pieces)
    H = torch.where(owner[:, None] == owner, G, 0)
    found = Asked(case).scores(method="block_ggn", blocks="tensor")
    expected = oracle.influence(H, DAMPING, gradients(name, "loss"), gradients(name))
    torch.testing.assert_close(found.scores, expected, **CLOSE)
    assert found.diagnostics.residuals.max() < 1e-9


def test_one_layer_is_the_whole_matrix():
    asked = Asked(CASES["linear"])
    torch.testing.assert_close(asked.scores(method="block_ggn").scores, asked.expected("exact"), **CLOSE)


@pytest.mark.parametrize("method", ["exact", "block_ggn"])
def test_sampled_labels_approach_the_exact_matrix_and_follow_the_seed(method):
    asked = Asked(CASES["mlp_silu_smoothing"])
    exact = asked.scores(method=method).scores
    one, again, other = (
        asked.scores(method=method, fisher="sampled", seed=seed, damping=0.5).scores for seed in (0, 0, 1)
    )
    heavy = asked.scores(method=method, damping=0.5).scores
    torch.testing.assert_close(one, again)
    assert 1e-4 < (one - other).norm() / one.norm() < 0.2  # 16 draws of each of 12 examples
    assert (one - heavy).norm() < 0.2 * heavy.norm()
    assert (exact - heavy).norm() > 0.1 * heavy.norm()
