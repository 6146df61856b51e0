import oracle
import pytest
import torch
from drive import TIGHT, Setup, closed_form

from lightning_influence.curvature.factor_passes import CovariancePass, DiagonalPass
from lightning_influence.curvature.operators import Damped, FactoredOperator

SOME = ["mlp_relu_inplace_weighted", "conv2d_reflect_groups", "tokens"]


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize("name", SOME)
def test_it_is_the_matrix_that_the_closed_form_inverts(name, kind):
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
    operator = FactoredOperator(inverse, 12)
    assert (operator.numel, operator.num_examples) == (len(expected), 12)
    vectors = torch.randn(3, operator.numel, dtype=torch.float64)
    torch.testing.assert_close(operator.dense(), expected, **TIGHT)
    torch.testing.assert_close(operator.product(vectors), vectors @ expected, **TIGHT)
    torch.testing.assert_close(operator.batch_product(vectors, 3, 0), operator.product(vectors))
    damped = Damped(operator, 0.3)
    torch.testing.assert_close(damped.product(inverse.apply(vectors)), vectors, **TIGHT)
    torch.testing.assert_close(
        operator.product(vectors.float()), operator.product(vectors).float(), rtol=1e-3, atol=1e-3
    )
