"""Whether a loss of the user's own is that of the training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.captured import Captured
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.model.training_step import run_step
from lightning_influence.support.errors import LossCaptureError
from lightning_influence.support.notes import warn

# Chosen by hand: gradients of one loss in half precision have a cosine of .9999 and more.
_ALIKE = 0.999


def compare_with_step(captured: Captured, recorder: Recorder, module: Any, batch: Any, name: str) -> bool:
    """Compare the gradient of the user's own loss with that of ``training_step``, where that can be run.

    Args:
        captured: the batch, of the user's own loss.
        recorder: for the step.
        module: the user's module.
        batch: the batch.
        name: of the user's own loss, for messages.

    Returns:
        Whether they could be compared.

    Raises:
        LossCaptureError: if it points the other way.
    """
    count = captured.num_examples
    try:
        with recorder:
            step = run_step(module, batch)
        theirs = recorder.backward(step, None, count)
        ours = captured.recorder.backward(captured.total(), None, count)
    except Exception:  # the step may need a fit, whence the user's own loss; some gradients need rows
        return False
    # A layer's are as many in both, but for tables that one of the two uses in another way.
    pairs = [pair for layer in ours if layer in theirs for pair in zip(ours[layer], theirs[layer])]  # noqa: B905
    shared = [(own.flatten(), other.flatten()) for own, other in pairs if own.shape == other.shape]
    if not shared:
        return False
    check_direction(torch.cat([own for own, _ in shared]), torch.cat([other for _, other in shared]), name)
    return True


def check_direction(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Compare the gradient of a user's own loss with that of the training step, up to a positive factor.

    Args:
        ours: the gradient in the outputs of layers.
        theirs: that of the step.
        name: of the user's own loss, for messages.

    Raises:
        LossCaptureError: if it points the other way.
    """
    ours, theirs = ours.double(), theirs.double()
    size = float(ours.norm() * theirs.norm())
    if not 0 < size < float("inf"):
        return
    cosine = float(ours @ theirs) / size
    if cosine < 0:
        raise LossCaptureError(
            f"{name} goes against the training loss of the first batch (gradients of cosine {cosine:.3g}). "
            "Accepted is the loss that training makes smaller: return it without the minus."
        )
    if cosine < _ALIKE:
        warn(
            f"{name} is not the loss of `training_step`, nor a multiple of it: on the first batch their "
            f"gradients have the cosine {cosine:.3g}. Scores explain what it returns."
        )
