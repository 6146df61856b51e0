"""The layers that an edit may change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.edits.data import EditData, same
from lightning_influence.edits.passes import forward_if_weighted, rows_of
from lightning_influence.model.captured import Captured
from lightning_influence.model.forward import Forward
from lightning_influence.model.plan import LayerPlan, find_layers
from lightning_influence.running.runner import Runner
from lightning_influence.support.arguments import list_some
from lightning_influence.support.errors import InfluenceError, UnsupportedDataError, UnsupportedModelError
from lightning_influence.support.notes import Notes


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
        UnsupportedDataError: if one of them has no weight in the loss, or its new target is none.
        UnsupportedModelError: if no layer is left.
    """
    plan = find_layers(runner.module, layers)
    uncovered = plan.describe_uncovered()
    if uncovered is not None:
        notes.add(f"{uncovered} An edit leaves them as they are.")
    listening = _Listening(plan, data)
    runner.run(listening, data.edited_loader)
    listening.check_weights()
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
    """Finds out which layers take part in the loss, whether targets change, and what has no weight."""

    description = "Edit: layers"

    def __init__(self, plan: LayerPlan, data: EditData) -> None:
        self.forward = Forward(plan)
        self.changes = False
        self._data, self._weightless = data, torch.zeros(0, dtype=torch.int64)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Run one batch."""
        if self._data.targets is None:
            captured = forward_if_weighted(self.forward, module, batch, len(indices))
        else:
            captured = self._relabelled(module, batch, indices)
        rows = rows_of(self._data.edited)(indices)
        if captured is not None:
            rows = rows[captured.weights.cpu()[rows] == 0]
        self._weightless = torch.cat([self._weightless, indices[rows]])

    def _relabelled(self, module: Any, batch: Any, indices: Tensor) -> Captured | None:
        """Run one batch with its new targets.

        Returns:
            The captured batch; None if none of its examples has weight.

        Raises:
            InfluenceError: if a loss is not finite or not found.
            UnsupportedDataError: if the module cannot, though it can with the old ones.
        """
        seen = self._data.view(batch, indices)
        self.changes = self.changes or not same(batch, seen)
        try:
            return forward_if_weighted(self.forward, module, seen, len(indices))
        except InfluenceError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            forward_if_weighted(self.forward, module, batch, len(indices))
            examples = list_some(indices[rows_of(self._data.edited)(indices)])
            raise UnsupportedDataError(
                f"The training loss of examples {examples} cannot be computed with their new targets, as it "
                f"can with the old ones. {type(error).__name__}: {error} The new targets go from "
                f"{self._extremes()}. Pass targets that the loss accepts, such as class indices from 0 to "
                "C - 1."
            ) from error

    def _extremes(self) -> str:
        assert self._data.targets is not None
        return f"{self._data.targets.min().item()} to {self._data.targets.max().item()}"

    def check_weights(self) -> None:
        """Refuse edited examples that have no weight in the loss.

        Raises:
            UnsupportedDataError: naming them.
        """
        if not len(self._weightless):
            return
        found, why = list_some(self._weightless), "their labels are ignored, or of classes of weight zero"
        if self._data.targets is None:
            raise UnsupportedDataError(
                f"Examples {found} have no weight in the training loss ({why}): the model has not learned "
                "from them, and there is nothing to forget. Leave them out of `examples`."
            )
        raise UnsupportedDataError(
            f"With their new targets, examples {found} have no weight in the training loss ({why}). To have "
            "the model no longer know them use forget; pass targets that count to relabel."
        )
