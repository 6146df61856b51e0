import oracle
import pytest
import torch
from drive import TIGHT, Setup, run
from models import CASES
from operator_source import CaseSource

from lightning_influence.curvature.blocks import BlockProductPass, DenseBlockPass, block_indices, join_blocks
from lightning_influence.curvature.gauss_newton import CurvatureProductPass
from lightning_influence.curvature.operators import BlockOperator


def owners(case, blocks):
    """Which tensor or layer each coordinate of the flat vector belongs to, from the oracle's layout."""
    owner = oracle.layer_of_parameter(case.model, case.layers)
    if blocks == "layer":
        return owner
    is_bias = []
    for layer in map(case.model.get_submodule, case.layers):
        row = [False] * layer.weight[0].numel() + [True] * (layer.bias is not None)
        is_bias += row * layer.weight.shape[0]
    return 2 * owner + torch.tensor(is_bias)


def expected(setup, blocks):
    owner = owners(setup.case, blocks)
    return torch.where(owner[:, None] == owner, setup.ggn(), 0)


@pytest.mark.parametrize("blocks", ["layer", "tensor"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_products_and_blocks(name, blocks, monkeypatch):
    setup = Setup.of(name)
    matrix = expected(setup, blocks)
    vectors = torch.randn(3, setup.layout.numel, dtype=torch.float64)
    for autograd in (False, True):
        monkeypatch.setattr(CurvatureProductPass, "_autograd_is_cheaper", lambda *_, way=autograd: way)
        got = setup.run(BlockProductPass(setup.plan, vectors, blocks=blocks)).result()
        torch.testing.assert_close(got, vectors @ matrix, **TIGHT)
    pass_ = setup.run(DenseBlockPass(setup.plan, blocks=blocks))
    torch.testing.assert_close(join_blocks(pass_.result(), pass_.indices), matrix, **TIGHT)


@pytest.mark.parametrize("blocks", ["layer", "tensor"])
def test_indices_are_a_partition(blocks):
    setup = Setup.of("conv2d_reflect_groups")
    indices = block_indices(setup.plan, blocks)
    assert torch.cat(indices).sort().values.tolist() == list(range(setup.layout.numel))
    owner = owners(setup.case, blocks)
    assert [len(set(owner[index].tolist())) for index in indices] == [1] * len(owner.unique())


@pytest.mark.parametrize("blocks", ["layer", "tensor"])
def test_operator(blocks):
    source = CaseSource.of("tokens_weighted")
    operator = BlockOperator(source, blocks=blocks)
    matrix = expected(Setup.of("tokens_weighted"), blocks)
    vectors = torch.randn(2, operator.numel, dtype=torch.float64)
    torch.testing.assert_close(operator.dense(), matrix, **TIGHT)
    torch.testing.assert_close(operator.product(vectors), vectors @ matrix, **TIGHT)
    torch.testing.assert_close(operator.batch_product(vectors, 12, 0), vectors @ matrix, **TIGHT)


def test_estimates_have_the_same_blocks():
    setup = Setup.of("mlp_gelu")
    dense = setup.run(DenseBlockPass(setup.plan, fisher="sampled", draws=3, seed=2))
    eye = torch.eye(setup.layout.numel, dtype=torch.float64)
    products = setup.run(BlockProductPass(setup.plan, eye, fisher="sampled", draws=3, seed=2))
    torch.testing.assert_close(join_blocks(dense.result(), dense.indices), products.result(), **TIGHT)
    assert dense.estimated
    assert products.estimated


def test_the_sum_over_processes_is_what_is_averaged():
    setup = Setup.of("mlp_relu_inplace_weighted")
    case = setup.case
    passes = [
        run(DenseBlockPass(setup.plan), setup.module, [(case.x[part], case.y[part])])
        for part in (slice(0, 5), slice(5, 12))
    ]
    flat = torch.cat([total.flatten() for total in passes[1]._sums.values()])
    others = [flat, torch.tensor([7.0, passes[1].normaliser], dtype=torch.float64)]
    blocks = passes[0].result(lambda own: own + others.pop(0))
    torch.testing.assert_close(join_blocks(blocks, passes[0].indices), expected(setup, "layer"), **TIGHT)
    others = [flat, torch.tensor([7.0, passes[1].normaliser], dtype=torch.float64)]
    alone = DenseBlockPass(setup.plan).result(lambda own: own + others.pop(0))  # had no examples itself
    rest = run(DenseBlockPass(setup.plan), setup.module, [(case.x[5:], case.y[5:])]).result()
    for block, other in zip(alone, rest, strict=True):
        torch.testing.assert_close(block, other, **TIGHT)


def test_other_blocks_are_refused():
    with pytest.raises(ValueError, match="Got blocks='row'; accepted are 'layer' and 'tensor'"):
        block_indices(Setup.of("mlp_gelu").plan, "row")
