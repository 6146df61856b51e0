"""The block-diagonal Gauss-Newton matrix: cross terms between layers, or between tensors, left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_influence.curvature.gauss_newton import add_gram
from lightning_influence.curvature.passes import CurvaturePass
from lightning_influence.model.captured import Fisher
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import LayerPlan

#: One block a layer (weight and bias together), or one a parameter tensor.
Blocks = Literal["layer", "tensor"]


def block_indices(plan: LayerPlan, blocks: Blocks = "layer") -> list[Tensor]:
    """Positions in a flat vector of each block's parameters.

    Args:
        plan: the covered layers.
        blocks: one block a layer, or one a tensor (a layer's weight and its bias apart).

    Returns:
        For each block its indices, ascending; together they are ``0 .. P - 1``.

    Raises:
        ValueError: if ``blocks`` is neither.
    """
    if blocks not in get_args(Blocks):
        raise ValueError(f"Got blocks={blocks!r}; accepted are 'layer' and 'tensor'.")
    result, start = [], 0
    for layer in plan.layers.values():
        index = torch.arange(start, start + layer.numel)
        start += layer.numel
        if blocks == "tensor" and layer.has_bias:
            rows = index.view(-1, layer.d_in)
            result += [rows[:, :-1].flatten(), rows[:, -1].clone()]
        else:
            result.append(index)
    return result


class DenseBlockPass(CurvaturePass):
    """The diagonal blocks of the Gauss-Newton matrix in float64.

    Attributes:
        indices: where each block stands in a flat vector; see :func:`block_indices`.
        owners: the name of each block's layer.

    Args:
        plan: the covered layers.
        blocks: see :func:`block_indices`.
        fisher: see :class:`~.passes.CurvaturePass`; every column by default.
        draws: see :class:`~.passes.CurvaturePass`.
        seed: see :class:`~.passes.CurvaturePass`.
    """

    description = "Influence: dense curvature blocks"

    def __init__(
        self,
        plan: LayerPlan,
        *,
        blocks: Blocks = "layer",
        fisher: Fisher = "exact",
        draws: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(plan, fisher=fisher, draws=draws, seed=seed)
        self._plan, self._blocks = plan, blocks
        self.indices = block_indices(plan, blocks)
        self.owners = [
            name
            for name, layer in plan.layers.items()
            for _ in range(1 + (blocks == "tensor" and layer.has_bias))
        ]
        self._sums: dict[str, Tensor] = {}

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        gradients = self._gradients(self._capture(module, batch, len(indices)), indices)
        for name, layer in gradients.items():
            numel = self.layout.numels[name]
            if name not in self._sums:
                like = layer.like
                self._sums[name] = torch.zeros(numel, numel, dtype=torch.float64, device=like.device)
            add_gram(self._sums[name], {name: layer}, _rows)

    def result(self, all_reduce_sum: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Return the blocks ``(P_b, P_b)``: averages over the examples, of all processes if given their sum.

        They are in the order of :attr:`indices`.
        """
        device = next((total.device for total in self._sums.values()), torch.device("cpu"))
        parts = []
        for name, numel in self.layout.numels.items():
            empty = torch.zeros(numel, numel, dtype=torch.float64, device=device)
            parts.append(self._sums.get(name, empty).flatten())
        flat = self._total(torch.cat(parts), all_reduce_sum)
        sizes = [numel**2 for numel in self.layout.numels.values()]
        result = []
        for (name, numel), block in zip(self.layout.numels.items(), torch.split(flat, sizes), strict=True):
            layer = self._plan.layers[name]
            matrix = block.view(numel, numel)
            if self._blocks == "tensor" and layer.has_bias:
                bias = torch.arange(numel, device=matrix.device) % layer.d_in == layer.d_in - 1
                result += [matrix[~bias][:, ~bias], matrix[bias][:, bias]]
            else:
                result.append(matrix)
        return result


def _rows(gradients: Mapping[str, LayerGradients]) -> Tensor:
    """Return one layer's gradients as flat vectors ``(K, B, P_l)``."""
    (layer,) = gradients.values()
    return layer.dense().flatten(2)
