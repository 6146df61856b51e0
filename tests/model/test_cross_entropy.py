from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_reference import TIGHT, check_against_torch, check_rows, curvature
from torch import Tensor
from torch.nn import functional as F

from lightning_influence.model.losses import cross_entropy
from lightning_influence.model.losses.cross_entropy import (
    CrossEntropyLoss,
    parse_cross_entropy,
    parse_nll_loss,
)
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError

B, C = 3, 4
SHAPES = {
    "plain": (B, C),
    "spatial": (B, C, 2),
    "volume": (B, C, 2, 1),
    "flat": (2 * B, C),
    "flat2": (2 * B, C, 2),
}


def logits(shape: tuple[int, ...], seed: int = 0, **options) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(**options).requires_grad_()


def labels(shape: tuple[int, ...], seed: int = 0, classes: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes or shape[1], (shape[0], *shape[2:]), generator=generator)


def parsed(parse: Callable[..., CrossEntropyLoss], *args, **kwargs) -> CrossEntropyLoss:
    return replace(parse(*args, **kwargs), num_examples=B)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.sampled_from(sorted(SHAPES.values())),
    reduction=st.sampled_from(["mean", "sum"]),
    smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    weighted=st.booleans(),
    ignore=st.sampled_from([None, -100, 1]),
    seed=st.integers(0, 99),
)
def test_index_targets(shape, reduction, smoothing, weighted, ignore, seed):
    outputs, target = logits(shape, seed), labels(shape, seed)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
    if ignore is not None:
        options["ignore_index"] = ignore
        target.view(-1)[1::2] = ignore
        target.view(-1)[0] = 2
    loss = parsed(parse_cross_entropy, outputs, target, **options)
    check_against_torch(loss, lambda o: F.cross_entropy(o, target, **options))
    summed = options | {"reduction": "sum"}
    check_rows(loss, lambda o, at: F.cross_entropy(o, target[at], **summed))


@settings(deadline=None, max_examples=15)
@given(
    shape=st.sampled_from(sorted(SHAPES.values())),
    reduction=st.sampled_from(["mean", "sum"]),
    smoothing=st.sampled_from([0.0, 0.3]),
    weighted=st.booleans(),
    normalised=st.booleans(),
)
def test_probability_targets(shape, reduction, smoothing, weighted, normalised):
    target = logits(shape, 5).detach().abs()
    target = target / target.sum(1, keepdim=True) if normalised else target
    options = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.tensor([0.5, 2.0, 0.0, 0.25], dtype=torch.float64)
    outputs = logits(shape)
    loss = parsed(parse_cross_entropy, outputs, target, **options)
    check_against_torch(loss, lambda o: F.cross_entropy(o, target, **options))
    # The mean of probability targets divides by positions, whatever their weights.
    if reduction == "mean":
        assert loss.weights().tolist() == [outputs.numel() / (B * C)] * B


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nll_loss_is_the_cross_entropy_before_log_softmax(shape, reduction, weighted):
    raw, target = logits(shape), labels(shape)
    target.view(-1)[1] = -100
    weight = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64) if weighted else None
    options = {"weight": weight, "reduction": reduction}
    loss = parsed(parse_nll_loss, raw.log_softmax(1), target, **options)
    reference = parsed(parse_cross_entropy, raw, target, **options)
    torch.testing.assert_close(
        loss.batch_value(), F.nll_loss(raw.detach().log_softmax(1), target, **options), **TIGHT
    )
    torch.testing.assert_close(loss.gradient(), reference.gradient(), **TIGHT)
    torch.testing.assert_close(curvature(loss), curvature(reference), **TIGHT)
    # Pulled back to the logits, the seeds are what autograd finds for torch's own loss.
    share = loss.scale / loss.weights().sum()
    (pulled,) = torch.autograd.grad(loss.outputs, raw, share * loss.gradient())
    (expected,) = torch.autograd.grad(F.nll_loss(raw.log_softmax(1), target, **options), raw)
    torch.testing.assert_close(pulled, expected, **TIGHT)


def test_nll_loss_refuses_what_is_not_normalised():
    with pytest.raises(LossCaptureError, match=r"not log-probabilities.*F.log_softmax"):
        parse_nll_loss(logits((B, C)), labels((B, C)))


def test_nll_loss_does_not_look_at_ignored_rows():
    rows = logits((B, C)).detach().log_softmax(1)
    rows[1] = 0.0
    target = torch.tensor([0, -100, 2])
    assert parse_nll_loss(rows.requires_grad_(), target).weights().tolist() == [1, 0, 1]


@pytest.mark.parametrize("shape", [(B, C), (B, C, 2), (2 * B, C)])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2, "weight": torch.tensor([0.5, 2, 1, 0.25]).double()}]
)
def test_expectation_over_all_labels_is_the_curvature(shape, options, monkeypatch):
    target = labels(shape)
    target.view(-1)[1] = -100
    loss = parsed(parse_cross_entropy, logits(shape), target, **options)
    positions = loss.num_columns // C
    p = loss._softmax
    total = torch.zeros(B, loss.num_columns, loss.num_columns, dtype=torch.float64)
    for combination in product(range(C), repeat=positions):
        drawn = torch.tensor(combination).expand(B, positions)
        monkeypatch.setattr(cross_entropy, "draw_labels", lambda p, g, drawn=drawn: drawn)
        seed = loss.sample().reshape(B, -1) if loss.outputs.dim() < 3 else loss.sample().flatten(1)
        chance = p.gather(-1, drawn.unsqueeze(-1)).prod(1).squeeze(-1)
        total += torch.einsum("n,ni,nj->nij", chance, seed, seed)
    torch.testing.assert_close(total, curvature(loss), **TIGHT)


def test_sample_follows_the_generator():
    loss = parsed(parse_cross_entropy, logits((B, C)), labels((B, C)))
    draw = partial(torch.Generator().manual_seed, 3)
    assert torch.equal(loss.sample(draw()), loss.sample(draw()))
    p, seed = loss.outputs.detach().softmax(1), loss.sample(draw())
    hot = p - seed
    torch.testing.assert_close(hot, F.one_hot(hot.argmax(1), C).double(), **TIGHT)


def test_columns_touch_one_position_each():
    loss = parsed(parse_cross_entropy, logits((B, C, 2)), labels((B, C, 2)))
    assert loss.num_columns == 2 * C
    for k, seed in enumerate(loss.columns()):
        assert seed.shape == (B, C, 2)
        assert not seed[:, :, 1 - k // C].any()
        assert seed[:, :, k // C].any()


def test_ignored_examples_contribute_nothing():
    target = torch.tensor([[0, 1], [-100, -100], [2, -100]])
    loss = parse_cross_entropy(logits((B, C, 2)), target)
    assert loss.weights().tolist() == [2, 0, 1]
    assert loss.per_example()[1] == 0
    seeds = [loss.gradient(), loss.sample(), *loss.columns()]
    assert not any(seed[1].any() or seed[2, :, 1].any() for seed in seeds)
    assert loss.true_score()[1] == 0
    assert loss.margin()[1] == 0


def test_weights_by_reduction():
    weight = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
    target = torch.tensor([[0, 1], [-100, 1], [2, 3]])
    loss = parse_cross_entropy(logits((B, C, 2)), target, weight=weight)
    assert loss.weights().tolist() == [2.5, 2.0, 1.25]
    assert replace(loss, reduction="position_mean").weights().tolist() == [2, 2, 2]
    assert replace(loss, reduction="example_mean").weights().tolist() == [1, 1, 1]
    values = F.cross_entropy(loss.outputs, target, weight=weight, reduction="none").detach()
    for reduction, value in {
        "position_mean": values.mean(),
        "example_mean": values.sum() / B,
        "none": values.mean(),
    }.items():
        torch.testing.assert_close(replace(loss, reduction=reduction).batch_value(), value, **TIGHT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_true_score_and_margin(shape):
    outputs, target = logits(shape), labels(shape)
    target.view(-1)[1] = -100
    loss = parsed(parse_cross_entropy, outputs, target, label_smoothing=0.1)
    kept, index = target != -100, target.clamp(min=0).unsqueeze(1)
    chance = outputs.softmax(1).gather(1, index).squeeze(1)
    odds, score = (chance / (1 - chance)).log() * kept, outputs.gather(1, index).squeeze(1) * kept
    torch.testing.assert_close(loss.margin(), odds.reshape(B, -1).sum(1), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(loss.true_score(), score.reshape(B, -1).sum(1), **TIGHT)
    (grad,) = torch.autograd.grad(loss.margin().sum(), outputs, retain_graph=True)
    (expected,) = torch.autograd.grad(odds.sum(), outputs)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-10)


def test_margin_is_exact_where_the_probability_rounds_to_one():
    outputs = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    margin = parse_cross_entropy(outputs, torch.tensor([0])).margin()
    torch.testing.assert_close(margin, 60 - torch.tensor([2.0], dtype=torch.float64).log(), **TIGHT)


def test_one_hot_targets_are_labels_and_soft_ones_are_not():
    outputs, target = logits((B, C)), labels((B, C))
    hot = F.one_hot(target, C).double()
    by_index, by_hot = parse_cross_entropy(outputs, target), parse_cross_entropy(outputs, hot)
    torch.testing.assert_close(by_hot.margin(), by_index.margin(), **TIGHT)
    with pytest.raises(UnsupportedModelError, match="soft probability targets"):
        parse_cross_entropy(outputs, 0.9 * hot + 0.025).true_score()
    with pytest.raises(UnsupportedModelError, match="at least 2 classes"):
        parse_cross_entropy(logits((B, 1)), torch.zeros(B, dtype=torch.long)).margin()


def test_masked_classes_stay_finite():
    outputs = logits((B, C)).detach()
    outputs[:, 3] = float("-inf")
    loss = parse_cross_entropy(outputs.requires_grad_(), torch.tensor([0, 1, 2]))
    for tensor in (loss.per_example(), loss.gradient(), loss.sample(), curvature(loss), loss.margin()):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    half = logits((B, C), dtype=dtype)
    weight = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=dtype)
    loss = parse_cross_entropy(half, labels((B, C)), weight=weight)
    full = parse_cross_entropy(half.detach().float(), labels((B, C)), weight=weight.float())
    for tensor in (
        loss.per_example(),
        loss.gradient(),
        loss.sample(),
        loss.weights(),
        loss.margin(),
        *loss.columns(),
    ):
        assert tensor.dtype == torch.float32
    assert torch.equal(loss.gradient(), full.gradient())
    assert torch.equal(loss.per_example(), full.per_example())
    (grad,) = torch.autograd.grad(half * 1, half, loss.gradient())  # a float32 seed starts a half backward
    assert torch.equal(grad, full.gradient().to(dtype))


def test_refusals():
    outputs, target = logits((B, C)), labels((B, C))
    with pytest.raises(LossCaptureError, match=r"shape \(4,\).*keep the batch dimension"):
        parse_cross_entropy(outputs[0], target[0])
    with pytest.raises(LossCaptureError, match="target that requires a gradient"):
        parse_cross_entropy(outputs, outputs.softmax(1))
    with pytest.raises(LossCaptureError, match="class weight that requires a gradient"):
        parse_cross_entropy(outputs, target, weight=torch.ones(C, requires_grad=True))
    with pytest.raises(LossCaptureError, match=r"negative class weight \(least value -1"):
        parse_cross_entropy(outputs, target, weight=-torch.ones(C))
    with pytest.raises(LossCaptureError, match="negative sum of target probabilities"):
        parse_cross_entropy(outputs, -torch.ones(B, C))
