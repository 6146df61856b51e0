"""Losses that the user computes in a hook, ``influence_loss(batch) -> (B,)``: checks, and their curvature.

The hook gives per-example values, which is enough for gradients. When the values are those of one known loss
function, up to a factor that all examples share, its output curvature is known as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.model.losses.capture import LossCapture, same_loss
from lightning_influence.model.losses.combined import ScaledLoss
from lightning_influence.model.losses.graphs import walk
from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.support.errors import LossCaptureError, NonFiniteError


def check_per_example(values: object, batch_size: int, source: str) -> Tensor:
    """Check what a user's function returned for a batch.

    Args:
        values: what it returned.
        batch_size: number of examples ``B``.
        source: name of the function, for the messages.

    Returns:
        The values, shape ``(B,)``.

    Raises:
        TypeError: if it is no floating-point tensor.
        ValueError: if the shape is not ``(B,)``, or it does not depend on the parameters.
        NonFiniteError: if a value is NaN or infinite.
    """
    values = check_values(
        values, (batch_size,), source, f"of shape ({batch_size},), one value for each example"
    )
    bad = (~torch.isfinite(values.detach())).nonzero().flatten()
    if bad.numel():
        first = int(bad[0])
        raise NonFiniteError(
            f"{source} returned {bad.numel()} NaN or infinite values out of {batch_size}, the first in row "
            f"{first} ({values[first].item()}). Accepted are finite values: look at that example and the "
            "model's outputs for it."
        )
    return values


def check_values(values: object, shape: tuple[int, ...], source: str, accepted: str) -> Tensor:
    """Check that a user's function returned differentiable numbers of a shape.

    Args:
        values: what it returned.
        shape: the shape.
        source: name of the function, for the messages.
        accepted: the shape in words.

    Returns:
        The values.

    Raises:
        TypeError: if it is no floating-point tensor.
        ValueError: if the shape is another, or it does not depend on the parameters.
    """
    accepted = f"Accepted is a floating-point tensor {accepted}."
    if not isinstance(values, Tensor):
        raise TypeError(f"{source} returned {type(values).__name__}. {accepted}")
    if not values.is_floating_point():
        raise TypeError(f"{source} returned a tensor of {values.dtype}. {accepted}")
    if values.shape != shape:
        more = (
            " Do not average over the batch; sum or average over all other dimensions." if len(shape) else ""
        )
        raise ValueError(f"{source} returned shape {tuple(values.shape)}. {accepted}{more}")
    if not values.requires_grad:
        raise ValueError(
            f"{source} returned values without a graph. Do not detach them or run under torch.no_grad()."
        )
    return values


@torch.no_grad()
def per_example_capture(values: Tensor, capture: LossCapture, batch_size: int) -> OutputLoss | None:
    """The loss whose per-example values the hook returned, up to one factor shared by all examples.

    With a batch of one any factor would fit, so only those of the usual reductions count there. Values that
    are all zero determine no factor.

    Args:
        values: what ``influence_loss`` returned, shape ``(B,)``.
        capture: what ran while the hook did.
        batch_size: number of examples ``B``.

    Returns:
        The loss with the factor inside and all weights 1, or None if no single captured call explains the
        values, or parameters have a part in them beside it.

    Raises:
        TypeError: if the values are no floating-point tensor.
        ValueError: if their shape is not ``(B,)``, or they do not depend on the parameters.
        NonFiniteError: if a value is NaN or infinite.
    """
    values = check_per_example(values, batch_size, "influence_loss")
    nodes = {call.node for call in capture.calls if call.node is not None}
    if walk(values.grad_fn, nodes, ())[2] == "leaf":  # parameters make the factor, or are added
        return None
    values, found = values.detach(), list[ScaledLoss]()
    with torch._C.DisableTorchFunction():
        for call in capture.calls:
            try:
                loss = replace(call.read(batch_size), reduction="example_mean")
            except LossCaptureError:
                continue
            factor = _factor(values, loss)
            if factor is not None:
                found.append(ScaledLoss.of(loss, factor))
        if not found or any(not same_loss(found[0].inner, other.inner) for other in found[1:]):
            return None
    return found[0]


def _factor(values: Tensor, loss: OutputLoss) -> float | None:
    """Return the factor that turns the loss's values into the hook's, None if no single one does."""
    own, given = loss.per_example().double(), values.double()
    norm = own.square().sum()
    if not bool(norm > 0):
        return None
    dtypes = {values.dtype, loss.outputs.dtype}
    relative = 1e-8 if dtypes == {torch.float64} else max(1e-4, *(4 * torch.finfo(d).eps for d in dtypes))
    fits = (own @ given) / norm
    for factor in _natural(loss, own) if loss.num_examples == 1 else (fits.item(),):
        close = (given - factor * own).abs() <= relative * (given.abs() + given.abs().mean())
        if factor > 0 and bool(close.all()):
            return factor
    return None


def _natural(loss: OutputLoss, own: Tensor) -> Iterator[float]:
    """The factors of a sum and of the means over one example's positions."""
    yield 1.0
    for reduction in ("mean", "position_mean"):
        yield (replace(loss, reduction=reduction).batch_value() / own.sum()).item()
