import oracle
import pytest
import torch
from drive import TIGHT
from models import CASES
from operator_source import CaseSource

from lightning_influence.curvature.operators import Damped, GaussNewtonOperator, HessianOperator
from lightning_influence.support.errors import UnsupportedModelError

KINDS = {"hessian": (HessianOperator, oracle.hessian), "ggn": (GaussNewtonOperator, oracle.ggn)}
SOME = ["mlp_gelu", "mlp_relu_inplace_weighted", "tokens_weighted", "conv2d_reflect_groups"]


def problem(case):
    return case.model, case.loss, case.x, case.y, case.layers


def draw(count, numel, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, numel, dtype=torch.float64, generator=generator)


@pytest.mark.grid
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOME)
def test_products_and_matrix_are_those_of_the_oracle(name, kind):
    source = CaseSource.of(name)
    make, reference = KINDS[kind]
    operator, H = make(source), reference(*problem(source.case))
    assert (operator.numel, operator.num_examples) == (len(H), 12)
    vectors = draw(3, operator.numel)
    torch.testing.assert_close(operator.product(vectors), vectors @ H, **TIGHT)
    torch.testing.assert_close(operator.dense(), H, **TIGHT)
    assert operator.mean_weight == pytest.approx(source.case.loss.normaliser(source.case.y))


@pytest.mark.grid
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp_relu_inplace_weighted", "tokens_weighted"])
def test_minibatches_average_to_all_the_data(name, kind):
    """Examples in ones: the mean over single-example minibatches is the product itself, weights and all."""
    source = CaseSource.of(name, batch_size=1)
    operator = KINDS[kind][0](source)
    vectors = draw(2, operator.numel)
    seen, total = {}, torch.zeros_like(vectors)
    for seed in range(400):
        index = int(source.train.sample(1, seed).indices)
        if index not in seen:
            seen[index] = operator.batch_product(vectors, 1, seed)
            total += seen[index]
        if len(seen) == 12:
            break
    torch.testing.assert_close(total / 12, operator.product(vectors), **TIGHT)
    few = operator.batch_product(vectors, 4, 9)
    chosen = source.train.sample(4, 9).indices.tolist()
    torch.testing.assert_close(few, sum(seen[i] for i in chosen) / 4, **TIGHT)
    torch.testing.assert_close(operator.batch_product(vectors, 4, 9), few)
    torch.testing.assert_close(operator.batch_product(vectors, 99, 3), total / 12, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_damping_is_added_once(kind):
    source = CaseSource.of("mlp_gelu")
    operator = KINDS[kind][0](source)
    H = operator.dense()
    vectors = draw(2, operator.numel)
    for damping in (0.3, torch.linspace(0.1, 1, operator.numel, dtype=torch.float64)):
        damped = Damped(operator, damping)
        full = H + torch.diag(torch.as_tensor(damping, dtype=H.dtype).expand(len(H)))
        torch.testing.assert_close(damped.dense(), full, **TIGHT)
        torch.testing.assert_close(damped.product(vectors), vectors @ full, **TIGHT)
        torch.testing.assert_close(damped.batch_product(vectors, 12, 0), vectors @ full, **TIGHT)
        assert (damped.numel, damped.num_examples) == (operator.numel, 12)


def test_what_is_refused():
    operator = GaussNewtonOperator(CaseSource.of("mlp_gelu"))
    with pytest.raises(ValueError, match=rf"shape \(3,\).*accepted are .* \(V, {operator.numel}\)"):
        operator.product(torch.zeros(3))
    with pytest.raises(ValueError, match="floating-point"):
        operator.product(torch.zeros(1, operator.numel, dtype=torch.int64))
    with pytest.raises(ValueError, match="Got count=0; accepted are positive"):
        operator.batch_product(torch.zeros(1, operator.numel).double(), 0, 0)
    with pytest.raises(UnsupportedModelError, match="at most 5 parameters are accepted"):
        operator.dense(5)


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_estimates_of_the_fisher(fisher):
    case = CASES["mlp_silu_smoothing"]
    operator = GaussNewtonOperator(CaseSource.of("mlp_silu_smoothing"), fisher=fisher, draws=2000)
    matrix = operator.dense()
    exact = (oracle.ggn if fisher == "sampled" else oracle.fisher_empirical)(*problem(case))
    tolerance = 0.05 if fisher == "sampled" else 1e-10  # 2000 draws an example
    assert (matrix - exact).norm() <= tolerance * exact.norm()
    vectors = draw(2, operator.numel)
    torch.testing.assert_close(operator.product(vectors), vectors @ matrix, **TIGHT)
