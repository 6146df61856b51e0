"""Ways to answer beside a compact space are judged by curvature that they were not fitted to."""

from dataclasses import replace

import pytest
import torch
from drive import TIGHT, closed_form
from test_compact_two_level import build, compare, densify, operate, split
from test_two_level import DAMPING, Problem

from lightning_influence.curvature.compact_ways import Form, System, choose, measure_gains
from lightning_influence.curvature.low_rank_matrices import DenseMatrices
from lightning_influence.curvature.row_passes import RowsPass

SEVERAL_COLUMNS = ["mlp_gelu", "tokens_weighted", "conv2d_replicate_depthwise"]


def fit(
    A: torch.Tensor, v: torch.Tensor, Q: torch.Tensor, z: torch.Tensor | None, lead: torch.Tensor | float
):
    """The best ``lead + t z + Q c`` in the norm of ``A``, by least squares."""
    basis = Q if z is None else torch.cat([z[None], Q])
    weights = torch.linalg.lstsq(basis @ A @ basis.T, basis @ (v - A @ lead), driver="gelsd").solution
    return lead + weights @ basis


def gain(x: torch.Tensor, A: torch.Tensor, v: torch.Tensor) -> float:
    return float((x @ v).clamp_min(0).square() / (x @ A @ x))


def expect_ways(A, v, Q, forms):
    """Answers by each way in a system, with directions."""
    return [fit(A, v, Q, None, forms[0]), *(fit(A, v, Q, z, 0 * z) for z in forms)]


def expect_gains(halves, v, Q, forms) -> list[float]:
    found = [expect_ways(A, v, Q, forms) for A in halves]
    gains = []
    for number, (one, two) in enumerate(zip(*found, strict=True)):
        if len(forms) > 1 and number < 2:  # made with the first form
            gains.append(-1.0)
            continue
        along = (one @ v + two @ v) / 2
        curved = (one @ halves[1] @ one + two @ halves[0] @ two) / 2
        gains.append(float(along.clamp_min(0).square() / curved))
    return [*gains, gain(forms[-1], sum(halves) / 2, v)]


@pytest.mark.parametrize("forms", [1, 2])
@pytest.mark.parametrize("directions", [0, 3])
def test_gains_are_those_of_the_other_half(forms, directions):
    generator = torch.Generator().manual_seed(forms)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    P, count = 9, 4
    roots = [draw(P, 6) for _ in range(2)]
    halves = [B @ B.T + 0.1 * torch.eye(P, dtype=torch.float64) for B in roots]
    Q, W, V, Z = draw(directions, P), draw(5, P), draw(count, P), draw(forms, count, P)
    both = torch.cat([W, Q])
    systems = []
    for A in halves:
        small = Q @ A @ Q.T
        placed = [
            Form(0, 1.0, z @ A @ both.T, (z * V).sum(1), ((z @ A) * z).sum(1)) for z in Z
        ]  # fmt: skip
        systems.append(System(small, placed))
    found = measure_gains(systems, V @ both.T, torch.float64)
    for q, v in enumerate(V):
        expected = torch.tensor(expect_gains(halves, v, Q, list(Z[:, q])), dtype=torch.float64)
        torch.testing.assert_close(found[:, q], expected, rtol=1e-8, atol=1e-10)


def test_the_largest_gain_is_chosen_among_what_is_better_than_nothing():
    seen = torch.ones(4, 8, dtype=torch.float64)
    left = torch.tensor(
        [[0.5, 0.9, 3.0, 2.0], [0.4, 1.2, 0.8, 1.5], [0.9, 0.2, 0.7, 1.1]], dtype=torch.float64
    )
    gains = torch.tensor(
        [[3.0, 1.0, 9.0, 9.0], [2.0, 7.0, 2.0, 2.0], [1.0, 2.0, 1.0, 1.0]], dtype=torch.float64
    )
    remainders = left[:, :, None].expand(3, 4, 8)
    found = choose(remainders, seen, torch.ones(4, dtype=torch.float64), 0.0, gains)
    assert found.best.tolist() == [0, 2, 1, 2]
    assert choose(remainders, seen, torch.ones(4, dtype=torch.float64), 0.0).best.tolist() == [1, 2, 2, 2]


@pytest.mark.grid
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("name", SEVERAL_COLUMNS)
def test_mixtures_are_halved_to_choose(name, stages):
    p = Problem(name, anchors=3)
    space, layout = build(p, 1, 400, stages=stages), p.setup.layout
    columns = space.rows.values.shape[1]
    assert columns > 1
    everything = layout.split(torch.eye(layout.numel, dtype=torch.float64))
    vectors = {key: DenseMatrices(part) for key, part in everything.items()}
    rows = p.setup.run(RowsPass(p.setup.plan, vectors)).rows(space.rows.values).values
    damped = p.matrix(DAMPING) - p.matrix(0.0)
    halves = []
    for parity in (0, 1):
        some = rows[:, parity::2]
        G = torch.einsum("nkp,nkq->pq", some, some) * columns / some.shape[1] / space.normaliser
        halves.append(G + damped)
    if columns % 2 == 0:
        torch.testing.assert_close(sum(halves) / 2, p.matrix(DAMPING), **TIGHT)
    closed = closed_form(p.factors, layout, 30 * DAMPING)
    V, A = layout.dense(p.queries)[0], p.matrix(DAMPING)
    bases, Q, W = [p.inverse.apply(V), closed.apply(V)], split(p, space), densify(p, space.probes)
    found, residuals, _ = compare(p, operate(p, p.inverse, replace(space, mixtures=columns)), closed)
    alone, solutions = 0, found.solutions()
    for q, v in enumerate(V):
        forms = [z[q] for z in bases]
        image, seen = W @ A @ forms[1], W @ v
        tried = [*expect_ways(A, v, Q, forms), forms[1] * (image @ seen) / (image @ image)]
        gains = expect_gains(halves, v, Q, forms)
        left = [float((seen - W @ A @ x).square().mean() / v.square().sum()) for x in tried]
        best = max((way for way in range(4) if left[way] < 1), key=lambda way: gains[way])
        assert best > 1
        torch.testing.assert_close(solutions[q], tried[best], rtol=1e-5, atol=1e-6)
        assert float(residuals[q]) ** 2 == pytest.approx(left[best], rel=1e-5)
        alone += best == 3
    assert found.alone == alone
