from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_reference import TIGHT, WEIGHTED, check_against_torch, check_rows, curvature, given_weight
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.model.losses import mse
from lightning_influence.model.losses.mse import parse_mse_loss
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError

B = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(
    rest=st.lists(st.integers(1, 3), max_size=3),
    flat=st.integers(1, 2),
    reduction=st.sampled_from(["mean", "sum"]),
    weighted=WEIGHTED,
)
def test_closed_forms(rest, flat, reduction, weighted):
    shape = (flat * B, *rest)
    outputs, target = normal(*shape).requires_grad_(), normal(*shape, seed=1)
    weight = normal(*shape, seed=2).abs() if weighted else None
    loss = replace(parse_mse_loss(outputs, target, reduction=reduction, weight=weight), num_examples=B)
    check_against_torch(loss, lambda o: F.mse_loss(o, target, reduction=reduction, **given_weight(weight)))
    check_rows(
        loss,
        lambda o, at: F.mse_loss(
            o, target[at], reduction="sum", **given_weight(None if weight is None else weight[at])
        ),
    )


def test_unit_of_mean_and_sum():
    outputs, target = normal(B, 5).requires_grad_(), normal(B, 5, seed=1)
    mean, total = parse_mse_loss(outputs, target), parse_mse_loss(outputs, target, reduction="sum")
    torch.testing.assert_close(mean.per_example(), (outputs - target).square().mean(1), **TIGHT)
    eye = torch.eye(5, dtype=torch.float64).expand(B, 5, 5)
    torch.testing.assert_close(curvature(mean), 2 / 5 * eye, **TIGHT)
    torch.testing.assert_close(curvature(total), 2 * eye, **TIGHT)
    assert mean.weights().tolist() == total.weights().tolist() == [1, 1, 1]
    assert (mean.scale, total.scale) == (1, 3)


@pytest.mark.parametrize("reduction", ["position_mean", "example_mean", "none"])
def test_other_reductions(reduction):
    outputs, target, weight = normal(B, 5).requires_grad_(), normal(B, 5, seed=1), normal(B, 5, seed=2).abs()
    loss = replace(parse_mse_loss(outputs, target, weight=weight), reduction=reduction)

    def reference(o: Tensor) -> Tensor:
        values = weight * (o - target).square()
        return values.sum() / B if reduction == "example_mean" else values.mean()

    check_against_torch(loss, reference)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_expectation_over_signs_is_the_curvature(reduction, monkeypatch):
    weight = normal(B, 3, seed=2).abs()
    loss = parse_mse_loss(
        normal(B, 3).requires_grad_(), normal(B, 3, seed=1), reduction=reduction, weight=weight
    )
    signs = [torch.tensor(s, dtype=torch.float64).expand(B, 3) for s in product([-1.0, 1.0], repeat=3)]
    total = torch.zeros(B, 3, 3, dtype=torch.float64)
    for sign in signs:  # like a normal draw, they have mean zero and the identity for covariance
        monkeypatch.setattr(mse, "draw_normal", lambda like, generator, sign=sign: sign)
        seed = loss.sample()
        total += torch.einsum("ni,nj->nij", seed, seed) / len(signs)
    torch.testing.assert_close(total, curvature(loss), **TIGHT)


def test_either_side_may_be_the_outputs():
    outputs, target = normal(B, 2).requires_grad_(), normal(B, 2, seed=1)
    loss = parse_mse_loss(target, outputs)
    assert loss.outputs is outputs
    check_against_torch(loss, lambda o: F.mse_loss(target, o))


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_may_broadcast_within_an_example():
    outputs, target = normal(B, 4).requires_grad_(), normal(B, 1, seed=1)
    check_against_torch(parse_mse_loss(outputs, target), lambda o: F.mse_loss(o, target))


def test_half_precision_is_computed_in_float32():
    half = normal(B, 2).half().requires_grad_()
    loss = parse_mse_loss(half, normal(B, 2, seed=1).half())
    for tensor in (loss.per_example(), loss.gradient(), loss.sample(), loss.weights(), *loss.columns()):
        assert tensor.dtype == torch.float32


def test_refusals():
    outputs = normal(B, 1).requires_grad_()
    with pytest.raises(
        LossCaptureError, match=r"shape \(3, 1\) with targets of shape \(3,\).*other examples"
    ):
        parse_mse_loss(outputs, normal(B))
    with pytest.raises(LossCaptureError, match=r"targets of shape \(2, 3, 1\)"):
        parse_mse_loss(outputs, normal(2, B, 1))
    with pytest.raises(LossCaptureError, match="target that requires a gradient"):
        parse_mse_loss(outputs, normal(B, 1).requires_grad_())
    with pytest.raises(LossCaptureError, match="negative weight"):
        parse_mse_loss(outputs, normal(B, 1), weight=-torch.ones(B, 1))
    with pytest.raises(LossCaptureError, match=r"weight of shape \(3,\)"):
        parse_mse_loss(outputs, normal(B, 1), weight=torch.ones(B))
    loss = parse_mse_loss(outputs, normal(B, 1))
    for measure in (loss.margin, loss.true_score):
        with pytest.raises(UnsupportedModelError, match=r"SquaredErrorLoss.* has no labels"):
            measure()


def test_one_output_that_squeeze_left_no_dimension():
    x = normal(5).requires_grad_()
    loss = parse_mse_loss((2 * x[:1]).squeeze(), torch.ones(1, dtype=torch.float64))
    assert loss.outputs.shape == loss.gradient().shape == (1,)
    (grad,) = torch.autograd.grad(loss.outputs, x, loss.gradient())
    assert grad[0] == pytest.approx(4 * (2 * x[0].item() - 1))
    assert loss.per_example().tolist() == pytest.approx([(2 * x[0].item() - 1) ** 2])
