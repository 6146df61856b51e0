from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_reference import TIGHT, check_against_torch, check_rows, curvature
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.model.losses.likelihoods import parse_gaussian_nll_loss, parse_poisson_nll_loss
from lightning_influence.support.errors import LossCaptureError

B = 3
_COUNTS = 80  # Poisson rates here stay below 12, so that what lies beyond has no weight


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counts(*shape: int) -> Tensor:
    return torch.randint(6, shape, generator=torch.Generator().manual_seed(2)).double()


@settings(deadline=None, max_examples=15)
@given(
    rest=st.lists(st.integers(1, 3), max_size=2),
    flat=st.integers(1, 2),
    reduction=st.sampled_from(["mean", "sum"]),
    full=st.booleans(),
)
def test_poisson_with_logarithms_of_rates(rest, flat, reduction, full):
    shape = (flat * B, *rest)
    outputs, target = normal(*shape).requires_grad_(), counts(*shape)
    loss = replace(parse_poisson_nll_loss(outputs, target, full=full, reduction=reduction), num_examples=B)
    check_against_torch(loss, lambda o: F.poisson_nll_loss(o, target, full=full, reduction=reduction))
    check_rows(loss, lambda o, at: F.poisson_nll_loss(o, target[at], full=full, reduction="sum"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_poisson_with_rates_has_the_information_of_drawn_counts(reduction):
    rates, target = (normal(B, 2).abs() + 0.1).requires_grad_(), counts(B, 2)
    loss = parse_poisson_nll_loss(rates, target, log_input=False, reduction=reduction)
    drawn = torch.arange(_COUNTS, dtype=torch.float64)[:, None, None]
    chance = torch.distributions.Poisson(rates.detach()).log_prob(drawn).exp()
    leaf = rates.detach().expand(_COUNTS, B, 2).clone().requires_grad_()
    value = F.poisson_nll_loss(leaf, drawn.expand_as(leaf), log_input=False, reduction="none")
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    diagonal = (chance * slope.square()).sum(0) * (1 / rates.numel() if reduction == "mean" else 1)
    # The 1e-8 that torch adds to rates shifts the mean of the slopes by as much.
    torch.testing.assert_close(
        curvature(loss) * (1 / B if reduction == "mean" else 1), torch.diag_embed(diagonal), rtol=1e-6, atol=0
    )
    check_against_torch(
        loss,
        lambda o: F.poisson_nll_loss(o, target, log_input=False, reduction=reduction),
        curvature(loss) * (1 / B if reduction == "mean" else 1),
    )


def gaussian_information(variance: Tensor, reduction: str) -> Tensor:
    """Fisher information (B, 2d, 2d) of means and variances: E[g g^T] over normal errors, by quadrature."""
    count, d = variance.shape
    # Gauss-Hermite points are exact for the fourth moments that appear.
    x, w = map(torch.from_numpy, hermegauss(12))
    w = w / w.sum()
    result = torch.zeros(count, 2 * d, 2 * d, dtype=torch.float64)
    for n in range(count):
        for i in range(d):
            v = variance[n, i]
            error = -x * v.sqrt()  # f - y
            slopes = torch.stack([error / v, (1 - error.square() / v) / (2 * v)])
            result[n, [[i], [d + i]], [[i, d + i]]] = torch.einsum("k,ik,jk->ij", w, slopes, slopes)
    return result / (variance.numel() if reduction == "mean" else 1)


@settings(deadline=None, max_examples=12)
@given(
    rest=st.lists(st.integers(1, 2), max_size=2),
    reduction=st.sampled_from(["mean", "sum"]),
    full=st.booleans(),
)
def test_gaussian_with_predicted_variances(rest, reduction, full):
    shape = (B, *rest)
    mean, variance = normal(*shape).requires_grad_(), (normal(*shape, seed=3).square() + 0.2).requires_grad_()
    target, d = normal(*shape, seed=1), normal(*shape).numel() // B
    loss = parse_gaussian_nll_loss(mean, target, variance, full=full, reduction=reduction)

    def whole(o: Tensor) -> Tensor:
        return F.gaussian_nll_loss(
            o[:, :d].reshape(shape), target, o[:, d:].reshape(shape), full=full, reduction=reduction
        )

    check_against_torch(loss, whole, gaussian_information(variance.detach().reshape(B, -1), reduction))
    by_both = torch.autograd.grad(loss.per_example().sum(), (mean, variance))
    direct = torch.autograd.grad(
        F.gaussian_nll_loss(mean, target, variance, reduction="sum") / (d if reduction == "mean" else 1),
        (mean, variance),
    )
    torch.testing.assert_close(by_both, direct, **TIGHT)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "number",
            marks=pytest.mark.skipif(
                F.gaussian_nll_loss.__annotations__["var"] is Tensor, reason="torch 2.4 takes tensors only"
            ),
        ),
        "elements",
        "one a row",
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_with_known_variances(kind, reduction):
    mean, target = normal(B, 2).requires_grad_(), normal(B, 2, seed=1)
    variance = {"number": 0.7, "elements": normal(B, 2, seed=2).abs() + 0.1, "one a row": torch.ones(B) / 3}
    known = variance[kind] if kind != "one a row" else variance[kind].double()
    loss = parse_gaussian_nll_loss(mean, target, known, full=True, reduction=reduction)
    check_against_torch(loss, lambda o: F.gaussian_nll_loss(o, target, known, full=True, reduction=reduction))


def test_variances_for_a_row_are_shared_by_its_elements():
    mean, variance = normal(B, 2).requires_grad_(), (normal(B, seed=3).square() + 0.2).requires_grad_()
    target = normal(B, 2, seed=1)
    with LossCapture() as capture:
        value = F.gaussian_nll_loss(mean, target, variance)
    loss = capture.resolve(value, B)
    found = torch.autograd.grad(loss.per_example().sum() / B, (mean, variance), retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(value, (mean, variance)), **TIGHT)


def test_variances_below_the_least_count_as_the_least():
    mean, variance = normal(B, 1).requires_grad_(), torch.full((B, 1), 1e-9).double().requires_grad_()
    target = mean.detach() + 2e-3
    loss = parse_gaussian_nll_loss(mean, target, variance, reduction="sum")
    value = F.gaussian_nll_loss(mean, target, variance, reduction="sum")
    torch.testing.assert_close(loss.batch_value(), value.detach(), **TIGHT)
    expected = torch.cat(torch.autograd.grad(value, (mean, variance)), 1)
    torch.testing.assert_close(loss.gradient(), expected, **TIGHT)


def test_refusals():
    outputs = normal(B, 2).requires_grad_()
    with pytest.raises(LossCaptureError, match=r"F.poisson_nll_loss compared .*\(3, 2\).*\(3, 1\)"):
        parse_poisson_nll_loss(outputs, counts(B, 1))
    with pytest.raises(LossCaptureError, match="target that requires a gradient"):
        parse_gaussian_nll_loss(outputs, outputs * 2, 1.0)
