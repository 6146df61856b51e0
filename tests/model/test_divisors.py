"""Losses that a user reduces: batches of one data set are taken alike, whatever their sizes and weights."""

import pytest
import torch
from torch.nn import functional as F

from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.support.errors import LossCaptureError

N, T, C = 7, 3, 4
generator = torch.Generator().manual_seed(0)
LOGITS = torch.randn(N, T, C, generator=generator, dtype=torch.float64)
LABELS = torch.randint(C, (N, T), generator=generator)
WEIGHT = torch.rand(N, generator=generator, dtype=torch.float64)
WEIGHT[:2] = 1  # a batch in which weighing shows nothing
MASK = torch.arange(T) < torch.tensor([3, 3, 1, 2, 3, 1, 2])[:, None]


def values(z, y):
    return F.cross_entropy(z.mT, y, reduction="none")


def errors(z):
    return F.mse_loss(z, torch.ones_like(z), reduction="none")


# What a user writes, and the loss of each example and its weight, up to one factor for all.
WAYS = {
    "mean": (lambda z, y, w, m: values(z, y).mean(), lambda v, w, m: (v.mean(1), 1 + 0 * w)),
    "factor": (lambda z, y, w, m: 0.5 * values(z, y).mean(), lambda v, w, m: (0.5 * v.mean(1), 1 + 0 * w)),
    "half": (lambda z, y, w, m: values(z, y).mean() / 2, lambda v, w, m: (0.5 * v.mean(1), 1 + 0 * w)),
    "by size": (lambda z, y, w, m: values(z, y).sum() / len(z), lambda v, w, m: (v.sum(1), 1 + 0 * w)),
    "sum": (lambda z, y, w, m: 0.5 * values(z, y).sum(), lambda v, w, m: (0.5 * v.sum(1), 1 + 0 * w)),
    "function's sum": (
        lambda z, y, w, m: 0.5 * F.cross_entropy(z.mT, y, reduction="sum"),
        lambda v, w, m: (0.5 * v.sum(1), 1 + 0 * w),
    ),
    "weighed": (
        lambda z, y, w, m: (values(z, y).mean(1) * w).mean(),
        lambda v, w, m: (v.mean(1) * w, 1 + 0 * w),
    ),
    "weighted mean": (
        lambda z, y, w, m: (values(z, y).sum(1) * w).sum() / w.sum(),
        lambda v, w, m: (v.sum(1) * w, w),
    ),
    "mask": (
        lambda z, y, w, m: (values(z, y) * m).sum() / m.sum(),
        lambda v, w, m: ((v * m).sum(1), m.sum(1)),
    ),
    "plain number of a mask": (
        lambda z, y, w, m: (values(z, y) * m).sum() / int(m.sum()),
        lambda v, w, m: ((v * m).sum(1), m.sum(1)),
    ),
    "picked values": (lambda z, y, w, m: values(z, y)[m].mean(), lambda v, w, m: ((v * m).sum(1), m.sum(1))),
    "mean of means": (
        lambda z, y, w, m: ((values(z, y) * m).sum(1) / m.sum(1)).mean(),
        lambda v, w, m: ((v * m).sum(1) / m.sum(1), 1 + 0 * w),
    ),
    "errors weighed": (
        lambda z, y, w, m: (errors(z).flatten(1).mean(1) * w).mean(),
        lambda v, w, m: (v * w, 1 + 0 * w),
    ),
    "errors masked": (
        lambda z, y, w, m: (errors(z) * m[..., None]).sum() / m[..., None].expand_as(z).sum(),
        lambda v, w, m: (v, C * m.sum(1)),
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 2, 3, N])
def test_examples_have_the_same_loss_in_batches_of_any_size(way, size):
    step, formula = WAYS[way]
    found, weights, sizes = [], [], []
    for start in range(0, N, size):
        at = slice(start, start + size)
        z = LOGITS[at].clone().requires_grad_()
        with LossCapture() as capture:
            loss = step(z, LABELS[at], WEIGHT[at], MASK[at])
        read = capture.resolve(loss, len(z))
        torch.testing.assert_close(read.batch_value(), loss.detach())
        found.append(read.per_example().detach())
        weights.append(read.weights())
        sizes.append(len(z))
    each = {
        "errors weighed": errors(LOGITS).flatten(1).mean(1),
        "errors masked": (errors(LOGITS) * MASK[..., None]).flatten(1).sum(1),
    }
    losses, weight = formula(each.get(way, values(LOGITS, LABELS)), WEIGHT, MASK)
    torch.testing.assert_close(torch.cat(found) / torch.cat(weights).mean(), losses / weight.double().mean())


def test_rows_that_a_mask_picked_are_not_counted_off():
    """As many as for equal lengths, of 4 and 2 positions: nothing says whose they are."""
    z, mask = LOGITS[:2].clone().requires_grad_(), torch.tensor([[True, True, True], [False, True, False]])
    with LossCapture() as capture:
        loss = F.cross_entropy(z[mask], LABELS[:2][mask])
    with pytest.raises(LossCaptureError, match="rows that a mask picked"):
        capture.resolve(loss, 2)
    with LossCapture() as capture:
        loss = F.cross_entropy(torch.masked_select(z, mask[..., None]).view(-1, C), LABELS[:2][mask])
    with pytest.raises(LossCaptureError, match="rows that a mask picked"):
        capture.resolve(loss, 2)


def test_weights_that_were_normalised_before_are_told():
    z, share = LOGITS[:, 0].clone().requires_grad_(), WEIGHT / WEIGHT.sum()
    with LossCapture() as capture:
        loss = (F.cross_entropy(z, LABELS[:, 0], reduction="none") * share).sum()
    read = capture.resolve(loss, N)
    torch.testing.assert_close(read.batch_value(), loss.detach())
    assert "Weights count as shares of their batch" in read.note


@pytest.mark.parametrize("divisor", [2.0, 8.0])
def test_the_hosts_own_division_is_no_mean(divisor):
    """Gradients that are accumulated over as many batches as a batch has examples."""
    z = LOGITS[:2, 0].clone().requires_grad_()
    with LossCapture() as capture:
        loss = F.cross_entropy(z, LABELS[:2, 0], reduction="none").sum()
    read = capture.resolve(loss / divisor, 2, divisor=divisor)
    assert read.reduction == "sum"
    torch.testing.assert_close(read.batch_value(), loss.detach())
