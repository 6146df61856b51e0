from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_reference import WEIGHTED, check_against_torch, check_rows, curvature, given_weight
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.model.losses.robust import (
    AbsoluteErrorLoss,
    parse_huber_loss,
    parse_l1_loss,
    parse_smooth_l1_loss,
)
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError

B = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(
    rest=st.lists(st.integers(1, 3), max_size=2),
    flat=st.integers(1, 2),
    reduction=st.sampled_from(["mean", "sum"]),
    width=st.sampled_from([0.3, 1.0, 2.5]),
    weighted=WEIGHTED,
)
def test_huber_and_smooth_l1(rest, flat, reduction, width, weighted):
    shape = (flat * B, *rest)
    outputs, target = normal(*shape).requires_grad_(), normal(*shape, seed=1)
    weight = normal(*shape, seed=2).abs() if weighted else None
    options = {"reduction": reduction, "delta": width, **given_weight(weight)}
    loss = replace(parse_huber_loss(outputs, target, **options), num_examples=B)
    check_against_torch(loss, lambda o: F.huber_loss(o, target, **options))
    if weight is None:
        smooth = replace(parse_smooth_l1_loss(target, outputs, reduction, width), num_examples=B)
        check_against_torch(smooth, lambda o: F.smooth_l1_loss(o, target, reduction=reduction, beta=width))
        check_rows(loss, lambda o, at: F.huber_loss(o, target[at], reduction="sum", delta=width))
    assert loss.note is None


@settings(deadline=None, max_examples=10)
@given(
    rest=st.lists(st.integers(1, 3), max_size=2),
    reduction=st.sampled_from(["mean", "sum"]),
    weighted=WEIGHTED,
)
def test_absolute_error_has_the_information_of_a_laplace_distribution(rest, reduction, weighted):
    outputs, target = normal(B, *rest).requires_grad_(), normal(B, *rest, seed=1)
    weight = normal(B, *rest, seed=2).abs() if weighted else None
    loss = parse_l1_loss(outputs, target, reduction, weight)
    # One element of weight w has the information w: that of Laplace(1), twice its density at 0, times w.
    laplace = torch.distributions.Laplace(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    at_zero = 2 * laplace.log_prob(torch.zeros((), dtype=torch.float64)).exp()
    diagonal = (torch.ones_like(target) if weight is None else weight).reshape(B, -1) * at_zero
    if reduction == "mean":
        diagonal = diagonal / (target.numel() if weight is None else weight.sum())
    check_against_torch(
        loss,
        lambda o: F.l1_loss(o, target, reduction=reduction, **given_weight(weight)),
        torch.diag_embed(diagonal),
    )
    assert "absolute error" in loss.note


def test_smooth_l1_without_a_rounded_corner_is_the_absolute_error():
    outputs, target = normal(B, 2).requires_grad_(), normal(B, 2, seed=1)
    loss = parse_smooth_l1_loss(outputs, target, beta=0)
    assert isinstance(loss, AbsoluteErrorLoss)
    torch.testing.assert_close(loss.batch_value(), F.smooth_l1_loss(outputs, target, beta=0).detach())


@pytest.mark.parametrize("parse", [parse_huber_loss, parse_l1_loss])
def test_signed_seeds_have_the_curvature_for_covariance(parse):
    loss = parse(normal(B, 2).requires_grad_(), normal(B, 2, seed=1))
    seeds = torch.stack([loss.sample(torch.Generator().manual_seed(k)) for k in range(4000)])
    covariance = torch.einsum("kni,knj->nij", seeds, seeds) / len(seeds)
    assert (covariance - curvature(loss)).abs().max() < 5 * 0.5 / 4000**0.5  # five standard errors


def test_refusals():
    outputs = normal(B, 1).requires_grad_()
    with pytest.raises(LossCaptureError, match=r"F.huber_loss compared outputs of shape \(3, 1\).*\(3,\)"):
        parse_huber_loss(outputs, normal(B))
    with pytest.raises(LossCaptureError, match=r"F.l1_loss got a weight of shape \(3,\)"):
        parse_l1_loss(outputs, normal(B, 1), weight=torch.ones(B))
    with pytest.raises(LossCaptureError, match="beta=-1; accepted are values of at least 0"):
        parse_smooth_l1_loss(outputs, normal(B, 1), beta=-1)
    with pytest.raises(UnsupportedModelError, match=r"HuberLoss.* has no labels"):
        parse_huber_loss(outputs, normal(B, 1)).margin()


def test_half_precision_is_computed_in_float32():
    loss = parse_huber_loss(normal(B, 2).half().requires_grad_(), normal(B, 2, seed=1).half())
    for tensor in (loss.per_example(), loss.gradient(), loss.sample(), loss.weights(), *loss.columns()):
        assert tensor.dtype == torch.float32
    torch.testing.assert_close(loss.gradient().double(), loss.with_outputs(loss.outputs.double()).gradient())
