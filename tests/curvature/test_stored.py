"""The Gauss-Newton matrix from gradients in memory is the one from passes."""

from __future__ import annotations

import copy
from dataclasses import replace

import oracle
import pytest
import torch
from models import CASES, lightning_module, loader
from operator_source import CaseSource
from torch import nn

from lightning_influence.curvature.operators import GaussNewtonOperator
from lightning_influence.curvature.stored import StoragePass, bound_kappa
from lightning_influence.model.layers.plan import Layout, find_layers
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.running.reading import prepare_train
from lightning_influence.support.errors import NonFiniteError

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def stored(source: CaseSource, limit: int = 2**28):
    one_pass = StoragePass(source.plan, limit=limit, num_examples=source.train.num_examples)
    source.runner.run(one_pass, source.train)
    assert one_pass.fits
    layout = Layout.of(source.plan.layers)
    return one_pass.operator(layout, source.train.indices, source.runner.all_reduce_sum)


@pytest.mark.parametrize("name", CASES)
def test_products_traces_and_squares_are_those_of_the_oracle(name):
    source = CaseSource.of(name)
    case, operator = source.case, stored(source)
    problem = (case.model, case.loss, case.x, case.y, case.layers)
    G = oracle.ggn(*problem)
    vectors = torch.randn(3, len(G), dtype=torch.float64)
    torch.testing.assert_close(operator.product(vectors), vectors @ G, **TIGHT)
    torch.testing.assert_close(operator.dense(), G, **TIGHT)
    assert operator.trace() == pytest.approx(float(G.trace()), rel=1e-9)
    assert (operator.numel, operator.num_examples) == (len(G), 12)
    assert operator.mean_weight == pytest.approx(case.loss.normaliser(case.y))
    J = oracle.output_jacobians(case.model, case.x, case.layers)
    curvature = oracle.output_hessians(case.model, case.loss, case.x, case.y)
    each = torch.einsum("nop,noq,nqr->npr", J, curvature, J)  # h_x of every example
    squares = (each @ vectors.T).square().sum(dim=1).mean(dim=0)
    torch.testing.assert_close(operator.squared_products(vectors), squares, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp_gelu", "tokens_weighted", "conv2d"])
def test_vectors_in_float64_are_multiplied_in_float64(name):
    """By gradients in float32: what residuals are told from, from memory and in a pass."""
    case = CASES[name]
    x, y = (t.float() if t.is_floating_point() else t for t in (case.x, case.y))
    case = replace(case, model=copy.deepcopy(case.model).float(), x=x, y=y)
    module = lightning_module(case)
    source = CaseSource(case, LoopRunner(module), find_layers(module), prepare_train(loader(case, 5)))
    operator = stored(source)
    vectors = torch.randn(3, operator.numel, dtype=torch.float64)
    truth = vectors @ operator.dense()
    torch.testing.assert_close(operator.product(vectors), truth, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(
        GaussNewtonOperator(source, fisher="exact").product(vectors), truth, rtol=1e-5, atol=1e-7
    )
    careless = operator.product(vectors.float()).double() - truth
    assert 1e-9 < careless.norm() / truth.norm() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_gelu", "tokens_weighted", "conv2d"])
def test_minibatches(name):
    source = CaseSource.of(name)
    operator = stored(source)
    vectors = torch.randn(2, operator.numel, dtype=torch.float64)
    for count, seed in ((1, 0), (5, 3), (11, 7)):
        found = operator.batch_product(vectors, count, seed)
        assert torch.equal(found, operator.batch_product(vectors, count, seed))
        passes = GaussNewtonOperator(source)
        torch.testing.assert_close(
            operator.batch_product(vectors, 12, seed), passes.product(vectors), **TIGHT
        )
    mean = sum(operator.batch_product(vectors, 4, seed) for seed in range(3000)) / 3000
    full = operator.product(vectors)
    assert float((mean - full).norm() / full.norm()) < 0.05
    singles = {operator.batch_product(vectors, 1, seed).sum().item() for seed in range(200)}
    assert len({round(value, 9) for value in singles}) == 12  # every example is drawn, and alone


def test_what_does_not_fit_is_let_go():
    source = CaseSource.of("mlp_gelu")
    one_pass = StoragePass(source.plan, limit=100, num_examples=12)
    source.runner.run(one_pass, source.train)
    assert not one_pass.fits


def test_a_layer_that_some_batches_do_not_use():
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.rare = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            use = x[:, :1] > 1.0
            out = self.body(x)
            return out + use * self.rare(x) if bool(use.any()) else out

    case = CASES["linear"]
    module = lightning_module(case)
    module.model = Rare().double()
    x = case.x.clamp(-0.9, 0.9).clone()
    x[7, 0] = 2.0
    traces = []
    for size in (1, 5, 12):
        source = CaseSource.of("linear", size)
        runner = type(source.runner)(module)
        data = torch.utils.data.TensorDataset(x, case.y)
        whole = CaseSource(
            case, runner, find_layers(module), prepare_train(torch.utils.data.DataLoader(data, size))
        )
        operator = stored(whole)
        torch.manual_seed(1)
        vectors = torch.randn(2, operator.numel, dtype=torch.float64)
        traces.append(operator.product(vectors))
    torch.testing.assert_close(traces[0], traces[1], **TIGHT)
    torch.testing.assert_close(traces[0], traces[2], **TIGHT)


def test_what_is_not_finite_is_refused():
    source = CaseSource.of("mlp_gelu")
    operator = stored(source)
    with pytest.raises(NonFiniteError, match="A curvature product is not finite"):
        operator.product(torch.full((1, operator.numel), float("inf"), dtype=torch.float64))


def test_the_order_of_the_loader_does_not_matter():
    source = CaseSource.of("mlp_gelu")
    batches = list(loader(source.case, 5))
    ready = CaseSource(source.case, source.runner, source.plan, prepare_train(batches))
    vectors = torch.randn(2, stored(source).numel, dtype=torch.float64)
    for seed in range(3):
        torch.testing.assert_close(
            stored(source).batch_product(vectors, 3, seed), stored(ready).batch_product(vectors, 3, seed)
        )


class Rows:
    """Curvatures x x^T of rank one, and the least kappa of E[h^2] <= kappa Tr(H) H."""

    def __init__(self, N: int, P: int) -> None:
        self.N, self.P = N, P
        self.rows = torch.randn(N, P, dtype=torch.float64) * (0.5 + torch.rand(N, 1, dtype=torch.float64))
        self.H = self.rows.T @ self.rows / N

    @property
    def kappa(self) -> float:
        second = (self.rows * self.rows.square().sum(dim=1, keepdim=True)).T @ self.rows / self.N
        values, vectors = torch.linalg.eigh(self.H)
        root = vectors / values.sqrt()
        return float(torch.linalg.eigvalsh(root.T @ second @ root)[-1] / self.H.trace())


def forms(problem, directions):
    products = directions @ problem.rows.T
    squares = (products.square() * problem.rows.square().sum(dim=1)).mean(dim=1)
    return squares, products.square().mean(dim=1)


def test_kappa_is_reached_in_the_worst_direction_and_not_exceeded():
    problem = Rows(200, 8)
    trace = float(problem.H.trace())
    second = (problem.rows * problem.rows.square().sum(dim=1, keepdim=True)).T @ problem.rows / problem.N
    values, vectors = torch.linalg.eigh(problem.H)
    root = vectors / values.sqrt()
    worst = root @ torch.linalg.eigh(root.T @ second @ root).eigenvectors[:, -1:]
    directions = torch.cat([torch.randn(20, problem.P, dtype=torch.float64), worst.T])
    assert bound_kappa(*forms(problem, directions), trace) == pytest.approx(problem.kappa)
    assert bound_kappa(*forms(problem, directions[:-1]), trace) <= problem.kappa


def test_one_example_many_times():
    problem = Rows(50, 5)
    problem.rows = problem.rows[:1].expand(50, -1)
    problem.H = problem.rows.T @ problem.rows / 50
    assert bound_kappa(
        *forms(problem, torch.randn(4, 5).double()), float(problem.H.trace())
    ) == pytest.approx(1.0)


def test_nothing_to_tell_from():
    assert bound_kappa(torch.zeros(3), torch.zeros(3), 0.0) == 1.0
    assert bound_kappa(torch.zeros(0), torch.zeros(0), 1.0) == 1.0
