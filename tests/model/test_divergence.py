from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_reference import check_against_torch, check_rows
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.model.losses.divergence import parse_kl_div
from lightning_influence.support.errors import LossCaptureError

B, C = 3, 4
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(
    shape=st.sampled_from([(B, C), (2 * B, C), (B, C, 2)]),
    reduction=st.sampled_from(["mean", "sum", "batchmean"]),
    log_target=st.booleans(),
)
def test_curvature_is_that_of_the_softmax(shape, reduction, log_target):
    """The reference differentiates through the softmax, whose logits are log-probabilities already."""
    outputs = normal(*shape).log_softmax(1).requires_grad_()
    target = normal(*shape, seed=1).log_softmax(1)
    given_target = target if log_target else target.exp()
    loss = replace(parse_kl_div(outputs, given_target, reduction, log_target), num_examples=B)
    function = lambda o: F.kl_div(  # noqa: E731
        o.log_softmax(1), given_target, reduction=reduction, log_target=log_target
    )
    check_against_torch(loss, function)
    check_rows(
        loss,
        lambda o, at: F.kl_div(o.log_softmax(1), given_target[at], reduction="sum", log_target=log_target),
    )


def test_classes_may_be_in_the_last_dimension():
    logits, target = normal(B, 5, C).requires_grad_(), normal(B, 5, C, seed=1).softmax(-1)
    loss = parse_kl_div(logits.log_softmax(-1), target, "batchmean")
    (found,) = torch.autograd.grad(loss.per_example().sum() / B, logits)
    (expected,) = torch.autograd.grad(F.kl_div(logits.log_softmax(-1), target, reduction="batchmean"), logits)
    torch.testing.assert_close(found, expected)
    assert loss.outputs.shape == (B, C, 5)


def test_targets_that_are_no_distribution_leave_out_rows():
    logits, target = normal(B, C).log_softmax(1).requires_grad_(), normal(B, C, seed=1).softmax(1)
    target[1] = 0
    loss = parse_kl_div(logits, target, "sum")
    check_against_torch(loss, lambda o: F.kl_div(o.log_softmax(1), target, reduction="sum"))
    assert loss.per_example()[1] == 0


def test_refusals():
    with pytest.raises(LossCaptureError, match="not log-probabilities"):
        parse_kl_div(normal(B, C).requires_grad_(), normal(B, C).softmax(1))
    with pytest.raises(LossCaptureError, match=r"shape \(3, 4\) with targets of shape \(4,\)"):
        parse_kl_div(normal(B, C).log_softmax(1).requires_grad_(), normal(C).softmax(0))
    with pytest.raises(LossCaptureError, match="target that requires a gradient"):
        parse_kl_div(normal(B, C).log_softmax(1), normal(B, C).softmax(1).requires_grad_())
    with pytest.raises(LossCaptureError, match="negative target"):
        parse_kl_div(normal(B, C).log_softmax(1), normal(B, C))
