"""Whether the losses of the examples add up to that of their batch: parts of it compared with the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_influence.model.losses.batch import BatchLoss, BatchLossTraits
from lightning_influence.model.losses.combined import WEIGHTED
from lightning_influence.model.unnamed.alone import REMEDY
from lightning_influence.support.errors import UnsupportedModelError

COUPLED = (
    "The loss of a batch is not made of losses of its examples: what one example adds depends on the others, "
    "as it does for a root of a mean, a Dice or contrastive loss over the batch. " + REMEDY
)


# Chosen by hand: the examples of so small a batch are all run alone as well.
_FEW = 8


def draw_parts(count: int) -> list[list[int]]:
    """Return parts of a batch: two random halves, the first and the last half, and each example of a few.

    A loss that takes its first rows in another way than its last ones has no such halves; of a few examples
    it may have both by chance.

    Args:
        count: number of examples ``B``.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    half = count // 2
    halves = [sorted(order[:half]), sorted(order[half:]), list(range(half)), list(range(half, count))]
    return halves + [[n] for n in range(count if 2 < count <= _FEW else 0)]


def check_cross_derivatives(loss: BatchLoss, part: Sequence[int], limit: float) -> None:
    """Refuse a loss in whose Hessian the outputs of some examples meet those of others.

    Raises:
        UnsupportedModelError: if they do.
    """
    probe = torch.randn(loss.outputs.shape, generator=torch.Generator().manual_seed(1)).to(loss.detached)
    probe[[n for n in range(loss.num_examples) if n not in part]] = 0
    bent = loss.products(probe)
    others = bent.clone()
    others[list(part)] = 0
    if bool(others.norm() > limit * bent.norm()):
        raise UnsupportedModelError(COUPLED)


def find_ratio(part: Tensor, rows: Tensor, limit: float) -> float | None:
    """Return the factor between a part's own gradients and those in the whole batch.

    Returns:
        The factor; NaN where all gradients are zero, None where no single one fits.
    """
    part, rows = part.double(), rows.double()
    energy = rows.square().sum()
    if not bool(energy > 0):
        return None if bool(part.any()) else math.nan
    ratio = (part * rows).sum() / energy
    fits = (part - ratio * rows).norm() <= limit * part.norm()
    return float(ratio) if bool(fits) and float(ratio) > 0 else None


def tell_mean(
    ratios: Sequence[float], shares: Sequence[float], limit: float, traits: BatchLossTraits
) -> bool:
    """Return whether parts of a batch are means of their examples, weighted or not, and not sums.

    Args:
        ratios: factor between the gradients of a part and of the whole, times the part's share.
        shares: the part's share in the examples.
        limit: relative error.
        traits: says what is odd.

    Raises:
        UnsupportedModelError: if they are neither.
    """
    known = [(ratio, share) for ratio, share in zip(ratios, shares, strict=True) if not math.isnan(ratio)]
    if all(abs(ratio - 1) <= 10 * limit for ratio, _ in known):
        return True
    if all(abs(ratio - share) <= 10 * limit for ratio, share in known):
        return False
    weights = [share / ratio for ratio, share in zip(ratios, shares, strict=True)]
    for first, second in zip(weights[0:4:2], weights[1:4:2], strict=True):
        if abs(first + second - 1) > 10 * limit:  # what two halves weigh makes up one
            raise UnsupportedModelError(COUPLED)
    traits.warn(WEIGHTED)
    return True
