"""The layers that an edit may change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_influence.edits.data import EditData
from lightning_influence.errors import UnsupportedModelError
from lightning_influence.layers import LayerPlan, find_layers
from lightning_influence.methods.context import Notes
from lightning_influence.passes.forward import Forward
from lightning_influence.running.base import Runner


def covered_layers(runner: Runner, data: EditData, layers: Sequence[str] | None, notes: Notes) -> LayerPlan:
    """Return the layers that may change, without those that the training loss does not use.

    Args:
        runner: an entered runner on the module.
        data: the examples.
        layers: names or patterns; all supported layers if None.
        notes: where to say what stays as it is.

    Returns:
        The layers.

    Raises:
        UnsupportedModelError: if none is left.
    """
    plan = find_layers(runner.module, layers)
    uncovered = plan.describe_uncovered()
    if uncovered is not None:
        notes.add(f"{uncovered} An edit leaves them as they are.")
    listening = _Listening(plan)
    runner.run(listening, data.edited_loader)
    silent = listening.forward.silent
    used = {name: layer for name, layer in plan.layers.items() if name not in silent}
    if not used:
        raise UnsupportedModelError(f"No layer takes part in the loss of the edited examples: {silent}.")
    if silent:
        notes.add(
            f"Layers {sorted(silent)} take no part in the loss of the edited examples; they stay as they are."
        )
    return LayerPlan(used, plan.uncovered, plan.verified)


class _Listening:
    """Finds out which layers take part in the loss."""

    description = "Edit: layers"

    def __init__(self, plan: LayerPlan) -> None:
        self.forward = Forward(plan)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Run one batch."""
        self.forward(module, batch, len(indices))
