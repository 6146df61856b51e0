"""The layers that an edit may change, and their weights as one flat vector that can be moved and put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.edits.data import EditData, hold_equal
from lightning_influence.model.captured import Captured
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import LayerPlan, Layout, find_layers
from lightning_influence.model.weightless import forward_if_weighted
from lightning_influence.running.runner import Runner
from lightning_influence.support.arguments import list_some
from lightning_influence.support.errors import InfluenceError, UnsupportedDataError, UnsupportedModelError
from lightning_influence.support.notes import Notes


class EditableWeights:
    """The weights that an edit may change, as they were when this was made.

    Args:
        module: the user's module.
        plan: its editable layers, in the order of the flat vectors.
        decays: weight decay of each layer's weights, in the unit of the mean loss.

    Attributes:
        plan: as given.
        layout: where each layer is in a flat vector ``(P,)``.
        parameters: the parameters, by the name that they have in the module.
        decay: weight decay of each weight, ``(P,)``.
    """

    def __init__(self, module: nn.Module, plan: LayerPlan, decays: Mapping[str, float]) -> None:
        self.plan, self.layout = plan, Layout.of(plan.layers)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        # By layer the names of its weight and its bias, whatever a rule takes for these.
        self._names: dict[str, tuple[str, str | None]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for key, layer in plan.layers.items():
            weight, bias = layer.rule.weight(layer.module), layer.rule.bias(layer.module)
            trained = [weight] if bias is None or not layer.has_bias else [weight, bias]
            own = [names[id(parameter)] for parameter in trained]
            self._names[key] = (own[0], own[1] if len(own) > 1 else None)
            self.parameters |= zip(own, trained, strict=True)
        self._originals = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.decay = self.layout.expand(decays, self.flat())

    def flat(self) -> Tensor:
        """Return the weights as they are now, ``(P,)``."""
        return self.join({name: parameter.detach() for name, parameter in self.parameters.items()})

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return values in the shapes of the parameters, by name, as a flat vector ``(P,)``."""
        blocks = {}
        for key, (weight, bias) in self._names.items():
            layer = self.plan.layers[key]
            blocks[key] = layer.from_parameters(values[weight], None if bias is None else values[bias])
        flat = self.layout.join(blocks)
        return flat if flat.dtype in {torch.float32, torch.float64} else flat.float()

    def by_parameter(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a flat vector ``(P,)`` in the shapes of the parameters, by name."""
        found: dict[str, Tensor] = {}
        for key, matrix in self.layout.split(flat).items():
            weight, bias = self._names[key]
            found[weight], own = self.plan.layers[key].to_parameters(matrix)
            if bias is not None and own is not None:
                found[bias] = own
        return found

    def move(self, change: Tensor) -> None:
        """Set the weights to the original ones plus a change ``(P,)``; where it is zero nothing moves."""
        self._set(self.by_parameter(change))

    def prepare_line(self, start: Tensor, unit: Tensor) -> Callable[[float], None]:
        """Return what sets the weights to the original ones plus ``start + step * unit``, for any step.

        Args:
            start: a change, ``(P,)``.
            unit: a change, ``(P,)``.
        """
        starts, units = self.by_parameter(start), self.by_parameter(unit)
        return lambda step: self._set({name: starts[name] + step * units[name] for name in starts})

    @torch.no_grad()
    def _set(self, changes: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            original, delta = self._originals[name], changes[name]
            moved = (original + delta.to(original.device)).to(original.dtype)
            parameter.copy_(torch.where(delta != 0, moved, original))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the original weights back, to the bit."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._originals[name])


def read_decays(plan: LayerPlan, given: float | None, record: TrainingRecord | None) -> dict[str, float]:
    """Return the weight decay of each layer, in the unit of the mean loss.

    Args:
        plan: the editable layers.
        given: that of all layers; None for what the record says.
        record: of the training run; None, or one of an optimizer without such a decay, for zero.
    """
    decays = dict.fromkeys(plan.layers, given or 0.0)
    if given is None and record is not None and record.family in {"sgd", "adam"}:
        for name in decays.keys() & record.layers.keys():
            decays[name] = record.layers[name].weight_decay / record.loss_scale
    return decays


def find_editable_layers(
    runner: Runner, data: EditData, layers: Sequence[str] | None, notes: Notes
) -> LayerPlan:
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
    one_pass = _LayersPass(plan, data)
    runner.run(one_pass, data.edited_loader)
    one_pass.check_weights()
    if data.targets is not None and not one_pass.changes:
        raise InfluenceError(
            "The new targets are the old ones: there is nothing to change. Pass the targets that the "
            "examples should have had; set_targets=, if given, has to put them into the batch."
        )
    silent = one_pass.forward.silent
    used = {name: layer for name, layer in plan.layers.items() if name not in silent}
    if not used:
        raise UnsupportedModelError(f"No layer takes part in the loss of the edited examples: {silent}.")
    if silent:
        notes.add(
            f"Layers {sorted(silent)} take no part in the loss of the edited examples; they stay as they are."
        )
    return replace(plan, layers=used)


class _LayersPass:
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
            captured = self._forward_relabelled(module, batch, indices)
        rows = torch.isin(indices, self._data.edited).nonzero().flatten()
        if captured is not None:
            rows = rows[captured.weights.cpu()[rows] == 0]
        self._weightless = torch.cat([self._weightless, indices[rows]])

    def _forward_relabelled(self, module: Any, batch: Any, indices: Tensor) -> Captured | None:
        """Run one batch with its new targets.

        Returns:
            The captured batch; None if none of its examples has weight.

        Raises:
            InfluenceError: if a loss is not finite or not found.
            UnsupportedDataError: if the module cannot, though it can with the old ones.
        """
        targets, seen = self._data.targets, self._data.view(batch, indices)
        assert targets is not None
        self.changes = self.changes or not hold_equal(batch, seen)
        try:
            return forward_if_weighted(self.forward, module, seen, len(indices))
        except InfluenceError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            forward_if_weighted(self.forward, module, batch, len(indices))
            examples = list_some(indices[torch.isin(indices, self._data.edited)])
            raise UnsupportedDataError(
                f"The training loss of examples {examples} cannot be computed with their new targets, as it "
                f"can with the old ones. {type(error).__name__}: {error} The new targets go from "
                f"{targets.min().item()} to {targets.max().item()}. Pass targets that the loss accepts, "
                "such as class indices from 0 to C - 1."
            ) from error

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
