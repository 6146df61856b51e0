"""Mean gradients of groups of queries, summed while the pass over the queries runs.

Every method is linear in a query's gradient at a fixed damping, so the scores of the mean gradient are the
mean scores of the queries. No gradient of a single query is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.methods.context import Context
from lightning_influence.methods.gathering import Gathered, differentiate, join_rows
from lightning_influence.methods.groups import Groups
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.measure import Measure
from lightning_influence.support.passes import Loader


class MeanGradientPass:
    """Averages the gradient of a measurement (the loss if None) over some groups of examples.

    Args:
        plan: the covered layers.
        measure: what to differentiate; None for the training loss.
        groups: of all examples.
        rows: positions of the groups to average over, one after the other.
        loaders: positions in ``groups`` of the loaders that the pass visits.
        dtype: precision the means are kept in.
        description: label of the progress bar.

    Attributes:
        means: by layer ``(rows, G, D_out, D_in)``, this process's part of them.
    """

    def __init__(
        self,
        plan: LayerPlan,
        measure: Measure | None,
        groups: Groups,
        *,
        rows: range,
        loaders: Sequence[int],
        dtype: torch.dtype,
        description: str = "Influence: query gradients",
    ) -> None:
        self.description = description
        self.forward = Forward(plan)
        self.means: dict[str, Tensor] = {}
        self._plan, self._measure, self._dtype = plan, measure, dtype
        self._groups, self._rows, self._loaders = groups, rows, loaders
        self._shares = 1.0 / groups.counts.to(dtype)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch.

        Raises:
            NonFiniteError: if a measurement or a gradient is NaN or infinite.
        """
        groups = self._groups.find(indices, self._loaders[dataloader_idx])
        gradients = differentiate(self.forward, module, batch, indices, self._measure)
        own = torch.tensor(sorted({*groups.tolist()} & {*self._rows}), dtype=torch.int64)
        if not len(own):
            return
        weights = (groups[:, None] == own).to(self._dtype) * self._shares[own]  # (B, groups of this batch)
        for name, layer in gradients.items():
            shape = self._plan.layers[name].shape
            device = layer.like.device
            if name not in self.means:
                self.means[name] = torch.zeros(len(self._rows), *shape, device=device, dtype=self._dtype)
            summed = layer.combine(weights[None].to(layer.like)).to(self._dtype)
            self.means[name].index_add_(0, (own - self._rows.start).to(device), summed)


def gather_means(
    context: Context, measure: Measure | None, loaders: Sequence[Loader], groups: Groups, rows: range
) -> Gathered:
    """Average the gradients of some groups of queries in one pass, and join what all processes have seen.

    Args:
        context: runs the pass.
        measure: what to differentiate; None for the training loss.
        loaders: all queries.
        groups: of all queries.
        rows: positions of the groups.

    Returns:
        One gradient a group; their positions stand in place of dataset indices.
    """
    visited, numbers = [], []
    for number, (loader, (indices, own)) in enumerate(zip(loaders, groups.members, strict=True)):
        wanted = (own >= rows.start) & (own < rows.stop)
        if bool(wanted.any()):
            visited.append(loader if bool(wanted.all()) else loader.holding(indices[wanted]))
            numbers.append(number)
    one_pass = MeanGradientPass(
        context.plan, measure, groups, rows=rows, loaders=numbers, dtype=context.dtype
    )
    context.runner.run(one_pass, visited)
    return join_rows(context, one_pass.means, rows)
