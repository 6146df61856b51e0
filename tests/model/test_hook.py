import pytest
import torch
from loss_reference import TIGHT, check_products, curvature
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.model.losses.combined import ScaledLoss
from lightning_influence.model.losses.hook import check_per_example, per_example_capture
from lightning_influence.support.errors import NonFiniteError

B, T, C = 4, 5, 3


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, C, T, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def target() -> Tensor:
    return torch.randint(C, (B, T), generator=torch.Generator().manual_seed(0))


def capture_of(hook, batch_size: int = B):
    with LossCapture() as capture:
        values = hook()
    return values, per_example_capture(values, capture, batch_size)


@pytest.mark.parametrize("factor", [1.0, 1 / T, 7.0])
def test_factor_is_found_and_carried(logits, target, factor):
    values, loss = capture_of(lambda: factor * F.cross_entropy(logits, target, reduction="none").sum(1))
    assert isinstance(loss, ScaledLoss)
    check_products(loss)
    assert loss.factor == pytest.approx(factor, rel=1e-12)
    torch.testing.assert_close(loss.per_example(), values, **TIGHT)
    (expected,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)
    torch.testing.assert_close(loss.gradient(), expected, **TIGHT)
    torch.testing.assert_close(loss.batch_value(), values.mean().detach(), **TIGHT)
    assert loss.weights().tolist() == [1] * B
    assert len(list(loss.columns())) == loss.num_columns == T * C

    def value(outputs: Tensor) -> Tensor:
        return factor * F.cross_entropy(outputs, target, reduction="none").sum()

    hessian = torch.func.hessian(value)(logits.detach()).reshape(B, T * C, B, T * C)
    index = torch.arange(B)
    torch.testing.assert_close(curvature(loss), hessian[index, :, index, :], **TIGHT)


def test_samples_margin_and_score_come_from_the_inner_loss(logits, target):
    _, loss = capture_of(lambda: 4 * F.cross_entropy(logits, target, reduction="none").sum(1))
    draw = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    torch.testing.assert_close(loss.sample(draw[0]), 2 * loss.inner.sample(draw[1]), **TIGHT)
    assert torch.equal(loss.margin(), loss.inner.margin())
    assert torch.equal(loss.true_score(), loss.inner.true_score())


def test_means_over_unpadded_tokens_share_no_factor(logits, target):
    target[0, 2:] = -100

    def hook():
        values = F.cross_entropy(logits, target, reduction="none")
        return values.sum(1) / (target != -100).sum(1)

    assert capture_of(hook)[1] is None


def test_values_from_elsewhere_have_no_known_loss(logits, target):
    assert capture_of(lambda: logits.square().sum((1, 2)))[1] is None
    assert capture_of(lambda: -F.cross_entropy(logits, target, reduction="none").sum(1))[1] is None

    def with_penalty():
        return F.cross_entropy(logits, target, reduction="none").sum(1) + 1e-6 * logits.square().sum((1, 2))

    assert capture_of(with_penalty)[1] is None
    assert (
        capture_of(lambda: F.soft_margin_loss(logits, torch.ones_like(logits), reduction="none").sum((1, 2)))[
            1
        ]
        is None
    )


def test_other_calls_beside_it_are_passed_over(logits, target):
    def hook():
        F.mse_loss(logits, torch.zeros_like(logits))
        F.cross_entropy(logits, target)
        return F.cross_entropy(logits, target, reduction="none").mean(1)

    loss = capture_of(hook)[1]
    assert loss.factor == pytest.approx(1 / T)


def test_two_different_losses_with_these_values_are_not_guessed(logits, target):
    def hook():
        F.cross_entropy(-logits, target, reduction="none")
        F.cross_entropy((logits + 1).flip(2), target.flip(1), reduction="none")
        return F.cross_entropy(logits, target, reduction="none").sum(1)

    assert capture_of(hook)[1] is None


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_batch_of_one_takes_only_the_usual_factors(logits, target, reduce):
    one, label = logits[:1], target[:1]

    def hook(factor):
        return factor * getattr(F.cross_entropy(one, label, reduction="none"), reduce)(1)

    loss = capture_of(lambda: hook(1), 1)[1]
    assert loss.factor == pytest.approx({"sum": 1, "mean": 1 / T}[reduce])
    assert capture_of(lambda: hook(1.37), 1)[1] is None


def test_zero_values_determine_no_factor():
    outputs = torch.zeros(B, 2, requires_grad=True)
    assert capture_of(lambda: F.mse_loss(outputs, torch.zeros(B, 2), reduction="none").sum(1))[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_the_hook(dtype, logits, target):
    outputs = logits.detach().to(dtype).requires_grad_()
    loss = capture_of(lambda: F.cross_entropy(outputs, target, reduction="none").mean(1))[1]
    assert loss.factor == pytest.approx(1 / T, rel=1e-4 if dtype == torch.float32 else 1e-2)


def test_scale_must_be_positive(logits, target):
    loss = capture_of(lambda: F.cross_entropy(logits, target, reduction="none").sum(1))[1]
    with pytest.raises(ValueError, match=r"factor=-1.0; accepted are positive"):
        ScaledLoss.of(loss.inner, -1.0)


def test_check_per_example():
    good = torch.ones(B, requires_grad=True)
    assert check_per_example(good, B, "hook") is good
    with pytest.raises(TypeError, match=r"hook returned float. Accepted is a floating-point tensor of shape"):
        check_per_example(1.0, B, "hook")
    with pytest.raises(TypeError, match=r"hook returned a tensor of torch.int64"):
        check_per_example(torch.ones(B, dtype=torch.long), B, "hook")
    with pytest.raises(ValueError, match=r"hook returned shape \(\).*Do not average over the batch"):
        check_per_example(good.mean(), B, "hook")
    with pytest.raises(ValueError, match="values without a graph"):
        check_per_example(good.detach(), B, "hook")
    with pytest.raises(
        NonFiniteError, match=r"1 NaN or infinite values out of 4, the first in row 2 \(nan\)"
    ):
        check_per_example(good * torch.tensor([1, 1, float("nan"), 1]), B, "hook")
