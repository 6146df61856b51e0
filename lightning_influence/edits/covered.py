"""The layers that an edit may change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_influence.edits.data import EditData, same
from lightning_influence.errors import InfluenceError, UnsupportedModelError
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
        InfluenceError: if the edited examples have their new targets already.
        UnsupportedModelError: if no layer is left.
    """
    plan = find_layers(runner.module, layers)
    uncovered = plan.describe_uncovered()
    if uncovered is not None:
        notes.add(f"{uncovered} An edit leaves them as they are.")
    listening = _Listening(plan, data)
    runner.run(listening, data.edited_loader)
    if data.targets is not None and not listening.changes:
        raise InfluenceError(
            "The new targets are the old ones: there is nothing to change. Pass the targets that the "
            "examples should have had; set_targets=, if given, has to put them into the batch."
        )
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
    """Finds out which layers take part in the loss, and whether an example gets another target."""

    description = "Edit: layers"

    def __init__(self, plan: LayerPlan, data: EditData) -> None:
        self.forward = Forward(plan)
        self.changes = False
        self._data = data

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Run one batch."""
        self.changes = self.changes or not same(batch, self._data.view(batch, indices))
        self.forward(module, batch, len(indices))
