"""The covered weights of a module as one flat vector, set for a while and put back to the bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.model.layers import Layer
from lightning_influence.model.plan import Layout


class Weights:
    """Covered weights, as they were when this was made.

    Args:
        layers: the covered layers, in the order of the flat vectors.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._layers = dict(layers)
        self._layout = Layout.of(layers)
        self._originals = [(p, p.detach().clone()) for p in self.parameters().values()]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the covered parameters by the name they have in the module."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self._layers.items():
            prefix = f"{name}." if name else ""
            found[f"{prefix}weight"] = layer.rule.weight(layer.module)
            bias = layer.rule.bias(layer.module)
            if layer.has_bias and bias is not None:
                found[f"{prefix}bias"] = bias
        return found

    def flat(self) -> Tensor:
        """Return the weights as they are now, ``(P,)``."""
        return self.join({name: parameter.detach() for name, parameter in self.parameters().items()})

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return values in the shapes of the parameters, by name, as a flat vector ``(P,)``."""
        blocks = {}
        for name, layer in self._layers.items():
            prefix = f"{name}." if name else ""
            blocks[name] = layer.from_parameters(values[f"{prefix}weight"], values.get(f"{prefix}bias"))
        flat = self._layout.join(blocks)
        return flat if flat.dtype in {torch.float32, torch.float64} else flat.float()

    def by_parameter(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a flat vector ``(P,)`` in the shapes of the parameters, by name."""
        found: dict[str, Tensor] = {}
        for name, matrix in self._layout.split(flat).items():
            prefix = f"{name}." if name else ""
            weight, bias = self._layers[name].to_parameters(matrix)
            found[f"{prefix}weight"] = weight
            if bias is not None:
                found[f"{prefix}bias"] = bias
        return found

    def decay(self, given: float | None, record: TrainingRecord | None) -> Tensor:
        """Return the weight decay of each weight, ``(P,)``, in the unit of the mean loss.

        Args:
            given: that of all weights; None for what the record says.
            record: of the training run; None, or one of an optimizer without such a decay, for zero.
        """
        values = dict.fromkeys(self._layers, given or 0.0)
        if given is None and record is not None and record.family in {"sgd", "adam"}:
            for name in values.keys() & record.layers.keys():
                values[name] = record.layers[name].weight_decay / record.loss_scale
        return self._layout.expand(values, self.flat())

    @torch.no_grad()
    def move(self, change: Tensor) -> None:
        """Set the weights to the original ones plus a change ``(P,)``; where it is zero nothing moves."""
        changes = self.by_parameter(change).values()
        for (parameter, original), delta in zip(self._originals, changes, strict=True):
            moved = (original + delta.to(original.device)).to(original.dtype)
            parameter.copy_(torch.where(delta != 0, moved, original))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the original weights back."""
        for parameter, original in self._originals:
            parameter.copy_(original)
