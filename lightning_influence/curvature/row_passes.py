"""Passes over curvature examples for the two halves of a product: ``B^T J V``, and ``J^T B W``.

The Gauss-Newton matrix is ``G = (1/N) sum_n (B_n^T J_n)^T (B_n^T J_n)``, ``J_n`` the derivative of an
example's outputs and ``B_n B_n^T`` their curvature (Schraudolph 2002). ``B^T J V`` has ``K`` numbers an
example and vector, however many parameters there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.compact_space import CurvatureRows
from lightning_influence.curvature.low_rank_matrices import Matrices
from lightning_influence.curvature.passes import CurvaturePass
from lightning_influence.model.layers.gradients import LayerGradients
from lightning_influence.model.layers.plan import LayerPlan


class RowsPass(CurvaturePass):
    """Finds ``B^T J V`` for every curvature example.

    Args:
        plan: the covered layers.
        blocks: ``V`` by layer, in several blocks; a layer without an entry is zero in all vectors.
        stages: the stage of each layer, for the last block: each of its vectors has a row for its part in
            every stage, which follow one another. None for one row a vector.
        draws: see :class:`~.passes.CurvaturePass`.
        seed: see there.
        room: see there; what vectors make of the inputs is shared by the columns recorded at once.
    """

    description = "Influence: curvature rows"

    def __init__(
        self,
        plan: LayerPlan,
        *blocks: Mapping[str, Matrices],
        stages: Mapping[str, int] | None = None,
        draws: int = 16,
        seed: int = 0,
        room: int = 0,
    ) -> None:
        super().__init__(plan, draws=draws, seed=seed, room=room)
        self._blocks = blocks
        self._stages: list[Mapping[str, int]] = [{}] * (len(blocks) - 1) + [stages or {}]
        self._rows: list[Tensor] = []
        self._indices: list[Tensor] = []

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Find the rows of one batch."""
        captured, parts = self._capture(module, batch, len(indices)), []
        for run in self._runs(captured, indices):
            found = [
                _add_stages(block, run, stages)
                for block, stages in zip(self._blocks, self._stages, strict=True)
            ]
            parts.append(torch.cat(found, dim=2))
            del run  # before the next ones are made
        self._rows.append(torch.cat(parts).transpose(0, 1))  # (B, K, V)
        self._indices.append(indices.cpu())

    def rows(
        self,
        like: Tensor,
        gather: Callable[[Tensor], Tensor] | None = None,
        *,
        blocks: slice = slice(None),
        keep: bool = False,
    ) -> CurvatureRows:
        """Return the rows of this process's examples, or of those of all; hands over what was kept.

        Args:
            like: a tensor of the device and precision: a process without examples knows none.
            gather: concatenates a tensor's rows over the processes; None for this process alone.
            blocks: of which blocks of vectors.
            keep: whether the rows of all blocks are kept, to be asked for again.
        """
        counts = [
            next(iter(block.values())).count * (1 + max(stages.values(), default=0))
            for block, stages in zip(self._blocks, self._stages, strict=True)
        ]
        first, last, _ = blocks.indices(len(counts))
        before, count = sum(counts[:first]), sum(counts[first:last])
        columns = max((part.shape[1] for part in self._rows), default=0)
        if gather is not None:
            columns = int(gather(torch.tensor([columns])).max())
        indices = torch.cat([torch.zeros(0, dtype=torch.int64), *self._indices])
        places, start = indices.argsort().argsort().to(like.device), 0
        values = like.new_zeros(len(indices), columns, count)
        parts = self._rows.copy() if keep else self._rows
        while parts:  # let go of one by one: not all of them twice in memory
            part = parts.pop(0)
            found = part[:, :, before : before + count].to(values)
            values[places[start : start + len(part)], : part.shape[1]] = found
            start += len(part)
        indices = indices.sort().values
        if gather is not None:
            indices, values = gather(indices).cpu(), gather(values)
            order = indices.argsort()
            indices, values = indices[order], values[order.to(values.device)]
        return CurvatureRows(indices, values)


def _add_stages(
    block: Mapping[str, Matrices], run: Mapping[str, LayerGradients], stages: Mapping[str, int]
) -> Tensor:
    """Return inner products of vectors with gradients, summed over each stage's layers, ``(K, B, V S)``."""
    sums: dict[int, Tensor] = {}
    for name, layer in run.items():
        if name in block:
            part, stage = block[name].dot(layer), stages.get(name, 0)
            sums[stage] = sums[stage].add_(part) if stage in sums else part
    zero = torch.zeros_like(next(iter(sums.values())))
    ordered = [sums.get(stage, zero) for stage in range(1 + max(stages.values(), default=0))]
    return ordered[0] if len(ordered) == 1 else torch.stack(ordered, dim=3).flatten(2)


class CombinationPass(CurvaturePass):
    """``(1/N) J^T B W`` for rows ``W``, such as a mixture of those that :class:`RowsPass` found.

    Args:
        plan: the covered layers.
        rows: ``W`` of all examples, ``V`` of each.
        draws: see :class:`~.passes.CurvaturePass`; as many as the rows were found with.
        seed: see there.
    """

    description = "Influence: mixtures of curvature rows"

    def __init__(self, plan: LayerPlan, rows: CurvatureRows, *, draws: int = 16, seed: int = 0) -> None:
        super().__init__(plan, draws=draws, seed=seed)
        self._rows = rows
        self._sum = rows.values.new_zeros(rows.values.shape[2], self.layout.numel)

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        captured, start = self._capture(module, batch, len(indices)), 0
        weights = self._rows.find(indices).transpose(0, 1)  # (K, B, V)
        if captured.loss is not None and weights.shape[2] < weights.shape[0]:
            everyone = weights.new_ones(1, len(indices), 1)
            for run in self._runs(captured, indices, weights):
                seeds = next(iter(run.values())).num_seeds
                for seed in range(seeds):
                    one = {name: layer.seeds(slice(seed, seed + 1)) for name, layer in run.items()}
                    self.layout.add_combination(self._sum[start + seed :][:1], one, everyone)
                start += seeds
            return
        for run in self._runs(captured, indices):
            seeds = next(iter(run.values())).num_seeds
            self.layout.add_combination(self._sum, run, weights[start : start + seeds])
            start += seeds

    def result(self, all_reduce_sum: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the average over the examples, of all processes if given their sum, ``(V, P)``."""
        return self._total(self._sum, all_reduce_sum)
