"""How the uses of a table make up its gradients, once for all seeds of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_influence.model.layers.gradients import DenseGradients, FactoredGradients, LayerGradients
from lightning_influence.model.layers.layer import Layer
from lightning_influence.model.layers.table_gradients import TableGradients
from lightning_influence.model.layers.use_recorder import Slopes
from lightning_influence.model.uses.parts import ParameterGradient, Part, Product, Rows


@dataclass(frozen=True)
class TableUses:
    """What the uses of a table ``(V, D)`` look up and map, which is the same for all seeds.

    Attributes:
        layer: the table.
        rows: that are looked up, ``(B, R)``; None if the table is also used in ways of which only formed
            gradients are known.
        inputs: what it maps, ``(1, B, S, D)``.
    """

    layer: Layer
    rows: Tensor | None = None
    inputs: Tensor | None = None

    @classmethod
    def read(cls, layer: Layer, gradient: ParameterGradient | None) -> TableUses:
        """Read the uses off the gradients of any seeds; those of no use are formed ones."""
        split = None if gradient is None else _split(layer, gradient)
        if split is None or gradient is None:
            return cls(layer)
        looked_up, mapped = split
        columns = layer.shape[2]
        count, like = gradient.num_examples, gradient.like
        none = torch.zeros(count, 0, dtype=torch.int64, device=like.device)
        return cls(
            layer,
            torch.cat([none, *(part.indices for part in looked_up)], dim=1),
            torch.cat([like.new_zeros(1, count, 0, columns), *(part.inputs for part in mapped)], dim=2),
        )

    @property
    def looks_up(self) -> bool:
        """Whether rows are looked up, and the table maps at most beside it."""
        return self.rows is not None and self.rows.shape[1] > 0

    def slopes(self, gradient: ParameterGradient | None, count: int) -> Slopes:
        """Return the gradients of one seed at what was looked up and what was mapped to.

        Args:
            gradient: of the table, ``K = 1``; None if no use has any.
            count: ``B``.

        Returns:
            ``(1, B, R, D)`` and ``(1, B, S, V)``; one tensor ``(1, B, V, D)`` where gradients are formed.
        """
        layer = self.layer
        weight = layer.rule.weight(layer.module)
        if self.rows is None or self.inputs is None:
            if gradient is None:
                dense = weight.detach().new_zeros(count, *weight.shape)
            else:
                dense = gradient.dense()[0]
            return (layer.from_parameters(dense, None).transpose(0, 1),)
        _, rows, columns = layer.shape
        looked_up, mapped = ([], []) if gradient is None else _split(layer, gradient) or ([], [])
        none = self.inputs.new_zeros
        values = [part.values for part in looked_up] or [none(1, count, self.rows.shape[1], columns)]
        outputs = [part.outputs[0] for part in mapped] or [none(1, count, self.inputs.shape[2], rows)]
        return _join(values), _join(outputs)

    def assemble(self, slopes: Slopes) -> LayerGradients:
        """Return gradients from what :meth:`slopes` gave, stacked to ``K`` seeds."""
        if self.rows is None or self.inputs is None:
            return DenseGradients(slopes[0].transpose(1, 2))
        values, outputs = slopes
        return TableGradients(self.rows, values[:, 0], FactoredGradients(self.inputs, outputs))


def _split(layer: Layer, gradient: ParameterGradient) -> tuple[list[Rows], list[Product]] | None:
    """Return the parts that are rows and those that are products, None if there are others."""
    looked_up: list[Rows] = []
    mapped: list[Product] = []
    for part, example in gradient.parts:
        form = None if example is not None else _in_rows(layer, part)
        if form is None:
            return None
        if isinstance(form, Rows):
            looked_up.append(form)
        else:
            mapped.append(form)
    return looked_up, mapped


def _in_rows(layer: Layer, part: Part) -> Rows | Product | None:
    """Return a part as one of the table ``(V, D)``, None if its seeds are not on the side of the rows."""
    _, rows, columns = layer.shape
    if isinstance(part, Rows):
        return None if layer.rule.transposed else part
    if not isinstance(part, Product) or len(part.shape) != 2 or len(part.inputs) != 1:
        return None
    turned = part.swap() if layer.rule.transposed else part
    fits = turned.is_plain() and (turned.outputs.shape[-1], turned.inputs.shape[-1]) == (rows, columns)
    return replace(turned, inputs=turned.inputs.to(turned.outputs.dtype)) if fits else None


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors ``(1, B, R, ...)`` along the positions."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)
