"""What the training step says of a batch, and of each of its examples run alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.batches.rearranging import Layout, rearranged
from lightning_influence.support.errors import LossCaptureError
from lightning_influence.support.random_states import preserve_rng

Run = Callable[[Any, Any], tuple[Tensor | None, Tensor | None]]
"""Maps a module and a batch to the losses of the examples ``(B,)``, or else to the loss of the batch."""

#: What to do about a loss of which examples have no part that is known.
REMEDY = (
    "Pass `loss=`, a callable `(module, batch) -> (B,)`, or define `influence_loss(batch) -> (B,)` on the "
    "module, with the loss that each example is to have."
)
#: Says that a batch's loss is the mean of those of its examples alone.
ONE_BY_ONE = "examples are run one by one"
_LAYOUT = "batch is read as "


def to_scalar(values: Tensor | None, batch_loss: Tensor | None) -> Tensor:
    """Return what a run has computed as the loss of the batch, a scalar.

    Raises:
        LossCaptureError: if it is no single number.
    """
    if values is not None:
        return values.mean()
    assert batch_loss is not None
    if batch_loss.numel() != 1:
        raise LossCaptureError(
            f"Got a training loss of shape {tuple(batch_loss.shape)}; accepted is a single number. {REMEDY}"
        )
    return batch_loss.reshape(())


def compute_alone(run: Run, module: Any, batch: Any, count: int, layout: Layout | None = None) -> Tensor:
    """Compute the losses of the examples, each run alone; their mean where that cannot be.

    Args:
        run: computes the loss.
        module: the user's module.
        batch: the batch.
        count: number of examples ``B``.
        layout: how to read the batch, if not as usual.

    Returns:
        The losses ``(B,)``, without a graph.
    """
    values = []
    with preserve_rng(), torch.no_grad():
        for n in range(count):
            try:
                values.append(to_scalar(*run(module, rearranged(batch, [n], count, layout))))
            except Exception:  # whatever the user's code may raise
                return to_scalar(*run(module, batch)).expand(count)
    return torch.stack(values)


def note_layout(layout: Layout) -> str:
    """Return a note of how batches are to be read, for passes that come later."""
    return _LAYOUT + json.dumps(list(layout.items()))


def read_layout(verified: Collection[str]) -> Layout:
    """Return how an earlier pass found that batches are to be read."""
    noted = next((text for text in verified if text.startswith(_LAYOUT)), None)
    return {} if noted is None else dict(json.loads(noted.removeprefix(_LAYOUT)))
