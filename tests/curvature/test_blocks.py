import oracle
import pytest
import torch
from drive import TIGHT, Setup, run
from models import CASES

from lightning_influence.curvature.blocks import DenseBlockPass, block_indices
from lightning_influence.curvature.gauss_newton import DenseCurvaturePass


def join_blocks(blocks, indices):
    """One matrix with these blocks at these indices and zeros elsewhere."""
    size = sum(map(len, indices))
    matrix = blocks[0].new_zeros(size, size)
    for block, index in zip(blocks, indices, strict=True):
        matrix[index[:, None], index] = block
    return matrix


def owners(case, blocks):
    """Which tensor or layer each coordinate of the flat vector belongs to, from the oracle's layout."""
    owner = oracle.layer_of_parameter(case.model, case.layers)
    if blocks == "layer":
        return owner
    is_bias = []
    for layer in (oracle.find_block(case.model, name) for name in case.layers):
        row = [False] * layer.weight[0].numel() + [True] * (layer.bias is not None)
        is_bias += row * layer.weight.shape[0]
    return 2 * owner + torch.tensor(is_bias)


def expected(setup, blocks):
    owner = owners(setup.case, blocks)
    return torch.where(owner[:, None] == owner, setup.ggn(), 0)


@pytest.mark.grid
@pytest.mark.parametrize("blocks", ["layer", "tensor"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_blocks_are_those_of_the_whole_matrix(name, blocks):
    setup = Setup.of(name)
    matrix = expected(setup, blocks)
    pass_ = setup.run(DenseBlockPass(setup.plan, blocks=blocks))
    torch.testing.assert_close(join_blocks(pass_.result(), pass_.indices), matrix, **TIGHT)


@pytest.mark.parametrize("blocks", ["layer", "tensor"])
def test_indices_are_a_partition(blocks):
    setup = Setup.of("conv2d_reflect_groups")
    indices = block_indices(setup.plan, blocks)
    assert torch.cat(indices).sort().values.tolist() == list(range(setup.layout.numel))
    owner = owners(setup.case, blocks)
    assert [len(set(owner[index].tolist())) for index in indices] == [1] * len(owner.unique())


def test_estimates_have_the_same_blocks():
    setup = Setup.of("mlp_gelu")
    dense = setup.run(DenseBlockPass(setup.plan, fisher="sampled", draws=3, seed=2))
    whole = setup.run(DenseCurvaturePass(setup.plan, fisher="sampled", draws=3, seed=2)).result()
    matrix = oracle.keep_blocks(whole, setup.case.model, setup.case.layers)
    torch.testing.assert_close(join_blocks(dense.result(), dense.indices), matrix, **TIGHT)
    assert dense.estimated


def test_the_sum_over_processes_is_what_is_averaged():
    setup = Setup.of("mlp_relu_inplace_weighted")
    case = setup.case
    passes = [
        run(DenseBlockPass(setup.plan), setup.module, [(case.x[part], case.y[part])])
        for part in (slice(0, 5), slice(5, 12))
    ]
    flat = torch.cat([total.flatten() for total in passes[1]._sums.values()])
    others = [flat, torch.tensor([7.0, passes[1].count.normaliser], dtype=torch.float64)]
    blocks = passes[0].result(lambda own: own + others.pop(0))
    torch.testing.assert_close(join_blocks(blocks, passes[0].indices), expected(setup, "layer"), **TIGHT)
    others = [flat, torch.tensor([7.0, passes[1].count.normaliser], dtype=torch.float64)]
    alone = DenseBlockPass(setup.plan).result(lambda own: own + others.pop(0))  # had no examples itself
    rest = run(DenseBlockPass(setup.plan), setup.module, [(case.x[5:], case.y[5:])]).result()
    for block, other in zip(alone, rest, strict=True):
        torch.testing.assert_close(block, other, **TIGHT)


def test_other_blocks_are_refused():
    with pytest.raises(ValueError, match="Got blocks='row'; accepted are 'layer' and 'tensor'"):
        block_indices(Setup.of("mlp_gelu").plan, "row")
