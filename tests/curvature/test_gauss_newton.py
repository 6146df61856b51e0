import pytest
import torch
from drive import TIGHT, Setup, run
from models import CASES

from lightning_influence.curvature.gauss_newton import CurvatureProductPass, DenseCurvaturePass, add_gram
from lightning_influence.model.forward import Forward
from lightning_influence.support.errors import NonFiniteError

SOME = [
    "mlp_softplus_weighted_smoothing",
    "mlp_bce",
    "mlp_mse",
    "tokens_weighted",
    "conv2d_replicate_depthwise",
]


def draw(setup: Setup, count: int = 4) -> torch.Tensor:
    return torch.randn(count, setup.layout.numel, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(CASES))
def test_products_and_matrix(name):
    setup = Setup.of(name)
    G, vectors = setup.ggn(), draw(setup)
    pass_ = setup.run(CurvatureProductPass(setup.plan, vectors))
    torch.testing.assert_close(pass_.result(), vectors @ G, **TIGHT)
    assert pass_.count.examples == 12
    assert not pass_.estimated
    assert pass_.columns == setup.case.model(setup.case.x)[0].numel()
    torch.testing.assert_close(setup.run(DenseCurvaturePass(setup.plan)).result(), G, **TIGHT)


@pytest.mark.grid
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", SOME)
def test_other_reductions(name, reduction):
    setup = Setup.of(name, reduction)
    vectors = draw(setup)
    got = setup.run(CurvatureProductPass(setup.plan, vectors)).result()
    torch.testing.assert_close(got, vectors @ setup.ggn(), **TIGHT)


@pytest.mark.grid
@pytest.mark.parametrize("batch_size", [1, 7, 12])
@pytest.mark.parametrize("name", SOME)
def test_batches_do_not_matter(name, batch_size):
    setup = Setup.of(name)
    got = setup.run(DenseCurvaturePass(setup.plan), batch_size).result()
    torch.testing.assert_close(got, setup.ggn(), **TIGHT)


@pytest.mark.slow
def test_too_many_columns_are_mixed_and_say_so():
    setup = Setup.of("tokens_weighted")
    exact = setup.ggn()
    totals = []
    for seed in range(150):
        few = setup.run(DenseCurvaturePass(setup.plan, max_columns=2, draws=3, seed=seed))
        assert few.estimated
        assert few.columns > 3
        totals.append(few.result())
    single, mean = (totals[0] - exact).norm(), (torch.stack(totals).mean(0) - exact).norm()
    assert single > 0.05 * exact.norm()
    assert mean < 2 * single / 150**0.5  # unbiased: the error of a mean of 150
    vectors = draw(setup)
    same = setup.run(CurvatureProductPass(setup.plan, vectors, max_columns=2, draws=3, seed=149))
    torch.testing.assert_close(same.result(), vectors @ totals[-1], **TIGHT)


@pytest.mark.parametrize("name", SOME)
def test_as_many_mixtures_as_columns_are_exact(name):
    setup = Setup.of(name)
    captured = Forward(setup.plan)(setup.module, [setup.case.x, setup.case.y], 12)
    total = torch.zeros_like(setup.ggn())
    generator = torch.Generator().manual_seed(1)
    add_gram(
        total, captured.curvature_gradients("mixed", generator, captured.loss.num_columns), setup.layout.dense
    )
    torch.testing.assert_close(total / captured.weights.sum(), setup.ggn(), **TIGHT)


def test_the_sum_over_processes_is_what_is_averaged():
    setup = Setup.of("mlp_relu_inplace_weighted")
    case, vectors = setup.case, draw(setup)
    passes = [
        run(CurvatureProductPass(setup.plan, vectors), setup.module, [(case.x[part], case.y[part])])
        for part in (slice(0, 5), slice(5, 12))
    ]
    others = [passes[1]._sums[0], torch.tensor([7.0, passes[1].count.normaliser], dtype=torch.float64)]
    total = passes[0].result(lambda own: own + others.pop(0))
    torch.testing.assert_close(total, vectors @ setup.ggn(), **TIGHT)


def test_a_spoiled_sum_is_refused():
    setup = Setup.of("mlp_mse")
    pass_ = setup.run(DenseCurvaturePass(setup.plan))
    pass_._sum[0, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="curvature of the training loss is not finite"):
        pass_.result()


@pytest.mark.grid
@pytest.mark.parametrize("name", ["tokens_weighted", "conv2d_reflect_groups", "mlp_gelu"])
@pytest.mark.parametrize("limit", [1, 10_000])
def test_blocks_of_vectors_and_few_seeds_at_a_time(name, limit, monkeypatch):
    from lightning_influence.curvature import passes as columns

    monkeypatch.setattr(columns, "_SEED_BYTES", limit)
    setup = Setup.of(name)
    vectors = draw(setup)
    blocks = [vectors[:1], vectors[1:]]
    first, rest = setup.run(CurvatureProductPass(setup.plan, blocks)).results()
    expected = vectors @ setup.ggn()
    torch.testing.assert_close(first, expected[:1], **TIGHT)
    torch.testing.assert_close(rest, expected[1:], **TIGHT)
    mixed = {"max_columns": 1, "draws": 2, "seed": 5}
    got = setup.run(CurvatureProductPass(setup.plan, vectors, **mixed)).result()
    monkeypatch.setattr(columns, "_SEED_BYTES", 2**30)
    torch.testing.assert_close(
        got, setup.run(CurvatureProductPass(setup.plan, vectors, **mixed)).result(), **TIGHT
    )
