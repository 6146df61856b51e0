"""Batches of which no example has weight in the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_influence.model.captured import Captured
from lightning_influence.model.forward import Forward
from lightning_influence.model.losses.calls import LossCall
from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.support.errors import LossCaptureError, NonFiniteError


def forward_if_weighted(forward: Forward, module: Any, batch: Any, num_examples: int) -> Captured | None:
    """Forward a batch, if any of its examples has weight in the loss: the mean over none of them is NaN.

    Args:
        forward: what runs the batch.
        module: the user's module.
        batch: the batch.
        num_examples: ``B``.

    Returns:
        The captured batch; None if all of its labels are ignored or of classes of weight zero.

    Raises:
        NonFiniteError: if a loss is NaN or infinite for another reason.
    """
    with LossCapture() as capture:
        try:
            return forward(module, batch, num_examples)
        except NonFiniteError:
            if any(_is_weightless(call, num_examples) for call in capture.calls):
                return None
            raise


def _is_weightless(call: LossCall, num_examples: int) -> bool:
    try:
        loss = call.read(num_examples)
    except LossCaptureError:
        return False
    return not bool(replace(loss, reduction="mean").weights().any())
