from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_reference import TIGHT, check_against_torch, check_rows, curvature
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.model.losses import bce
from lightning_influence.model.losses.bce import parse_bce, parse_bce_with_logits
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError

B = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=15)
@given(
    rest=st.lists(st.integers(1, 3), max_size=3),
    flat=st.integers(1, 2),
    reduction=st.sampled_from(["mean", "sum"]),
    weighted=st.sampled_from(["", "full", "last"]),
    positive=st.booleans(),
    soft=st.booleans(),
)
def test_closed_forms(rest, flat, reduction, weighted, positive, soft):
    shape = (flat * B, *rest)
    outputs, target = normal(*shape).requires_grad_(), normal(*shape, seed=1).sigmoid()
    options: dict = {"reduction": reduction}
    if not soft:
        target = target.round()
    if weighted:
        options["weight"] = normal(*(shape if weighted == "full" else shape[-1:]), seed=2).abs()
    if positive:
        options["pos_weight"] = normal(*shape[-1:], seed=3).abs()
    loss = replace(parse_bce_with_logits(outputs, target, **options), num_examples=B)
    check_against_torch(loss, lambda o: F.binary_cross_entropy_with_logits(o, target, **options))
    if not weighted and not positive:
        check_rows(loss, lambda o, at: F.binary_cross_entropy_with_logits(o, target[at], reduction="sum"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_expectation_over_all_bits_is_the_curvature(reduction, monkeypatch):
    d = 3
    loss = parse_bce_with_logits(
        normal(B, d).requires_grad_(),
        normal(B, d, seed=1).sigmoid(),
        weight=normal(B, d, seed=2).abs(),
        pos_weight=normal(d, seed=3).abs(),
        reduction=reduction,
    )
    p = loss.outputs.detach().sigmoid()
    total = torch.zeros(B, d, d, dtype=torch.float64)
    for combination in product([0.0, 1.0], repeat=d):
        bits = torch.tensor(combination, dtype=torch.float64).expand(B, d)
        monkeypatch.setattr(bce, "draw_bits", lambda p, generator, bits=bits: bits)
        seed, chance = loss.sample(), torch.where(bits == 1, p, 1 - p).prod(1)
        total += torch.einsum("n,ni,nj->nij", chance, seed, seed)
    torch.testing.assert_close(total, curvature(loss), **TIGHT)


def test_elements_of_weight_zero_contribute_nothing():
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor(
        [[1.0, 0.5], [0.0, 1.0], [0.3, 0.2]], dtype=torch.float64
    )  # soft only where ignored
    loss = parse_bce_with_logits(normal(B, 2).requires_grad_(), target, weight=weight)
    for seed in (loss.gradient(), loss.sample(), *loss.columns()):
        assert not seed[weight == 0].any()
    o = loss.outputs.detach()
    expected = torch.stack([o[0, 0], o[1, 1] - o[1, 0], torch.zeros((), dtype=torch.float64)])
    torch.testing.assert_close(loss.margin().detach(), expected, **TIGHT)
    torch.testing.assert_close(loss.true_score().detach(), expected, **TIGHT)


def test_margin_is_the_log_odds_of_the_true_label():
    outputs, target = normal(5).requires_grad_(), torch.tensor([0.0, 1, 1, 0, 1], dtype=torch.float64)
    loss = parse_bce_with_logits(outputs, target)
    chance = torch.where(target == 1, outputs.sigmoid(), 1 - outputs.sigmoid())
    torch.testing.assert_close(loss.margin(), (chance / (1 - chance)).log(), rtol=1e-9, atol=1e-12)
    assert loss.margin().requires_grad


def test_half_precision_is_computed_in_float32():
    half = normal(B, 2).bfloat16().requires_grad_()
    loss = parse_bce_with_logits(half, torch.ones(B, 2).bfloat16(), pos_weight=torch.ones(2).bfloat16())
    for tensor in (loss.per_example(), loss.gradient(), loss.sample(), loss.weights(), *loss.columns()):
        assert tensor.dtype == torch.float32


def test_refusals():
    outputs, target = normal(B, 2).requires_grad_(), torch.ones(B, 2, dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match="soft targets"):
        parse_bce_with_logits(outputs, target * 0.9).margin()
    with pytest.raises(LossCaptureError, match="target that requires a gradient"):
        parse_bce_with_logits(outputs, outputs.sigmoid())
    with pytest.raises(LossCaptureError, match="pos_weight that requires a gradient"):
        parse_bce_with_logits(outputs, target, pos_weight=torch.ones(2, requires_grad=True))
    with pytest.raises(LossCaptureError, match="negative curvature coefficient"):
        parse_bce_with_logits(outputs, target, weight=-torch.ones(2))
    with pytest.raises(LossCaptureError, match="without a batch dimension"):
        parse_bce_with_logits(outputs[0, 0], target[0, 0])


@settings(deadline=None, max_examples=10)
@given(
    rest=st.lists(st.integers(1, 2), max_size=2),
    reduction=st.sampled_from(["mean", "sum"]),
    weighted=st.booleans(),
    soft=st.booleans(),
)
def test_probabilities_have_the_information_of_bits(rest, reduction, weighted, soft):
    shape = (B, *rest)
    p, target = normal(*shape).sigmoid().requires_grad_(), normal(*shape, seed=1).sigmoid()
    target = target if soft else target.round()
    weight = normal(*shape, seed=2).abs() if weighted else None
    loss = parse_bce(p, target, weight, reduction)
    leaf = p.detach().expand(2, *shape).clone().requires_grad_()
    bits = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, *(1 for _ in shape)).expand_as(leaf)
    (slope,) = torch.autograd.grad(F.binary_cross_entropy(leaf, bits, reduction="sum"), leaf)
    chance = torch.stack([1 - p.detach(), p.detach()])
    diagonal = (chance * slope.square()).sum(0) * (1 if weight is None else weight)
    diagonal = diagonal.reshape(B, -1) / (p.numel() if reduction == "mean" else 1)
    check_against_torch(
        loss,
        lambda o: F.binary_cross_entropy(o, target, weight, reduction=reduction),
        torch.diag_embed(diagonal),
    )


def test_probabilities_behind_a_sigmoid_curve_like_logits():
    logits, target = normal(B, 2).requires_grad_(), normal(B, 2, seed=1).sigmoid().round()
    by_logits, p = parse_bce_with_logits(logits, target), logits.sigmoid()
    by_probabilities = parse_bce(p, target)
    slope = (p * (1 - p)).detach()
    torch.testing.assert_close(by_probabilities.curvature() * slope.square(), by_logits.curvature(), **TIGHT)
    torch.testing.assert_close(by_probabilities.margin(), by_logits.margin(), **TIGHT)
    torch.testing.assert_close(by_probabilities.true_score(), ((2 * target - 1) * p).sum(1), **TIGHT)
    draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    torch.testing.assert_close(by_probabilities.sample(draws[0]) * slope, by_logits.sample(draws[1]), **TIGHT)


def test_certain_probabilities_stay_finite():
    p = torch.tensor([[0.0], [1.0], [1.0]], dtype=torch.float64, requires_grad=True)
    loss = parse_bce(p, torch.tensor([[0.0], [1.0], [0.0]]).double())
    for tensor in (loss.per_example(), loss.gradient(), loss.curvature(), loss.margin()):
        assert torch.isfinite(tensor).all()
    torch.testing.assert_close(loss.batch_value(), F.binary_cross_entropy(p, loss.targets).detach(), **TIGHT)
