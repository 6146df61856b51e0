"""Minibatch estimates on models, against dense matrices of single examples."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from models import CASES
from operator_source import CaseSource

from lightning_influence.curvature.minibatches import measure_example_variance
from lightning_influence.curvature.operators import GaussNewtonOperator, HessianOperator
from lightning_influence.linalg.estimates import Estimate, draw_vectors
from lightning_influence.running.reading import prepare_train

NAMES = ["mlp_gelu", "mlp_relu_inplace_weighted"]


def singles(name, kind):
    """The curvature of each example's loss l_n, (N, P, P)."""
    case, wbar = CASES[name], CASES[name].loss.normaliser(CASES[name].y)
    make = getattr(oracle, kind)
    found = []
    for x, y in zip(case.x[:, None], case.y[:, None], strict=True):
        found.append(make(case.model, case.loss, x, y, case.layers) * case.loss.normaliser(y) / wbar)
    return torch.stack(found)


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_variance_of_examples_is_that_of_dense_matrices(name, count):
    h = singles(name, "ggn")
    H = h.mean(0)
    trace = float(H.trace())
    values, vectors = torch.linalg.eigh(H)
    directions = torch.cat([vectors[:, -3:].T, draw_vectors(2, len(H), 0, dtype=torch.float64)])
    ratios = [float((h @ v).square().sum(1).mean() / (trace * (v @ H @ v))) for v in directions]
    operator = GaussNewtonOperator(CaseSource.of(name, batch_size=1))
    found = measure_example_variance(operator, directions, trace, count=count, minibatches=150)
    assert abs(found.value - max(ratios)) < 3 * found.error
    assert found.error < 0.2 * found.value
    # It is a lower bound of the kappa that holds in every direction.
    root = vectors[:, values > 1e-9] / values[values > 1e-9].sqrt()
    kappa = float(torch.linalg.eigvalsh(root.T @ (h @ h).mean(0) @ root).max()) / trace
    assert max(ratios) <= kappa


def test_every_example_alone_gives_the_ratio_itself():
    """All 12 single-example minibatches, each once: no sampling error is left."""
    name = "mlp_gelu"
    h, source = singles(name, "ggn"), CaseSource.of(name, batch_size=1)
    H = h.mean(0)
    seeds = {}
    for seed in range(2000):
        seeds.setdefault(int(source.train.sample(1, seed).indices), seed)
    vector = torch.linalg.eigh(H).eigenvectors[:, -1:].T

    class Once(GaussNewtonOperator):
        calls = 0

        def batch_product(self, vectors, count, seed):
            self.calls += 1
            return super().batch_product(vectors, count, seeds[self.calls - 1])

    found = measure_example_variance(Once(source), vector, float(H.trace()), minibatches=12)
    v = vector[0]
    expected = float((h @ v).square().sum(1).mean() / (H.trace() * (v @ H @ v)))
    assert found.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sizes", [[12], [3, 3, 3, 3], [4, 4, 2, 2]])
def test_ready_made_batches_are_drawn_whole(sizes):
    """The formula takes the size of what was drawn, not what was asked for."""
    h, case = singles("mlp_gelu", "ggn"), CASES["mlp_gelu"]
    H = h.mean(0)
    source = CaseSource.of("mlp_gelu")
    batches = list(zip(case.x.split(sizes), case.y.split(sizes), strict=True))
    operator = GaussNewtonOperator(replace(source, train=prepare_train(batches)))
    v = torch.linalg.eigh(H).eigenvectors[:, -1:].T.contiguous()
    found = measure_example_variance(operator, v, float(H.trace()), minibatches=40)
    along = float(H.trace() * (v[0] @ H @ v[0]))
    if len(sizes) == 1:
        assert found == Estimate(pytest.approx(float((H @ v[0]).square().sum()) / along), None)
        return
    drawn = [operator.batch_examples(1, seed) for seed in range(40)]
    assert set(drawn) == set(sizes)
    # Each whole batch as a sample of its size, whatever the examples in it.
    means = [part.mean(0) @ v[0] for part in h.split(sizes)]
    mean = float((H @ v[0]).square().sum())
    each = [
        (mean + size * 11 / (12 - size) * (float(m.square().sum()) - mean)) / along
        for size, m in zip(sizes, means, strict=True)
    ]
    assert abs(found.value - sum(each) / len(each)) < 3 * found.error


def test_what_is_refused():
    operator = HessianOperator(CaseSource.of("mlp_gelu"))
    v = torch.randn(1, operator.numel, dtype=torch.float64)
    for count in (0, 12):
        with pytest.raises(ValueError, match=f"count={count}; accepted are 1 to 11"):
            measure_example_variance(operator, v, 1.0, count=count)
    with pytest.raises(ValueError, match="trace=-1; accepted are positive"):
        measure_example_variance(operator, v, -1.0)
    down = torch.linalg.eigh(operator.dense()).eigenvectors[:, :1].T
    with pytest.raises(ValueError, match=r"positive curvature\. Pass leading eigenvectors"):
        measure_example_variance(operator, down.contiguous(), 1.0)
