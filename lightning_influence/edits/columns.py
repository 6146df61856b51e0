"""Softer and fewer columns for the curvature of each example's outputs.

A classifier that hesitates does so between few classes: most of the trace of an example's output curvature
``B B^T`` lies along its leading eigenvectors, and every column saved is a backward pass saved.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.losses.base import OutputLoss
from lightning_influence.losses.hook import ScaledLoss


def softened(loss: OutputLoss, temperature: float) -> OutputLoss:
    """Return the loss with its outputs divided by a temperature, for its curvature.

    The curvature of a classifier's loss vanishes where it is sure, right or wrong: such examples
    then neither pull at a step nor hold it back, and the step is good for a short way only. Softer
    probabilities say how the outputs curve further on. Losses of constant curvature, as squared error, keep
    theirs.

    Args:
        loss: a captured loss.
        temperature: positive; 1 changes nothing.

    Returns:
        A detached copy.
    """
    if isinstance(loss, ScaledLoss):
        return ScaledLoss.of(softened(loss.inner, temperature), loss.factor)
    return replace(loss, outputs=loss.outputs.detach() / temperature)


def leading_columns(columns: Tensor, rows: Tensor, share: float) -> Tensor:
    """Replace a square root of each example's output curvature by its leading part.

    With ``Z_n (K, m)`` the columns of example ``n``, the eigenvectors of ``Z_n Z_n^T`` rotate them into
    orthogonal ones. Each example keeps the fewest that hold the share of its trace, scaled so that the trace
    is as before; what it keeps does not depend on the other examples of its batch.

    Args:
        columns: the columns of all examples, ``(K, B, m)``.
        rows: the examples that count, whose ranks decide how many columns are returned, ``(b,)``.
        share: of the trace, in (0, 1].

    Returns:
        ``(r, B, m)`` with ``r <= K``, zero where an example needs fewer.

    Raises:
        ValueError: if the share is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"Got share={share!r}; accepted are numbers above 0 and up to 1.")
    count = len(columns)
    if count < 2 or share == 1:
        return columns
    by_example = columns.transpose(0, 1).double()  # (B, K, m)
    values, vectors = torch.linalg.eigh(by_example @ by_example.mT)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    trace = values.sum(dim=-1, keepdim=True)
    held = values.cumsum(dim=-1) - values  # by the columns before each one
    keep = (held < share * trace) & (values > 0)
    kept = (values * keep).sum(dim=-1, keepdim=True)
    factor = keep * (trace / kept.clamp_min(torch.finfo(values.dtype).tiny)).sqrt()
    rank = max(1, int(keep[rows].sum(dim=-1).max())) if len(rows) else 1
    rotated = (vectors.mT @ by_example) * factor[..., None]
    few: Tensor = rotated[:, :rank].transpose(0, 1).to(columns.dtype)
    return few
