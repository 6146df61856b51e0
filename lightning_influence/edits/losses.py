"""Losses of examples, what the examples' outputs tell beside them, and samples that stand for many.

In a trained classifier few examples have nearly all the curvature: where the model is sure, its output
probabilities do not move. Taking the examples whose outputs curve most is therefore a far better use of a
limited number than taking them at random. For an objective that is minimised far away from the weights as
they are, that would leave out the examples that an edit spoils; there the curved ones are only likelier.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.edits.data import EditData
from lightning_influence.model.captured import Captured
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.loss_values import compute_losses
from lightning_influence.support.arguments import list_some
from lightning_influence.support.errors import LossCaptureError, NonFiniteError

MAX_COLUMNS = 64
"""Largest number of output columns of which each is used; beyond, random ones stand for all."""


class Losses:
    """Losses of some examples at the weights that they were measured at.

    Args:
        indices: dataset indices, ascending, ``(n,)``.
        values: before division by the mean weight, ``(n,)``.
        weights: each example's weight in the mean, ``(n,)``.
        chance: the values if all outputs were zero, ``(n,)``; NaN where they are not known.
        curvature: trace of the Hessian of each example's loss in its outputs, ``(n,)``.

    Attributes:
        indices: as given.
        values: as given, in float64 like all that follow.
        weights: as given.
        curvature: as given.
    """

    def __init__(
        self, indices: Tensor, values: Tensor, weights: Tensor, chance: Tensor, curvature: Tensor
    ) -> None:
        self.indices, self.values, self.weights = indices, values.double(), weights.double()
        self._chance, self.curvature = chance.double(), curvature.double()

    @property
    def chance(self) -> Tensor:
        """Losses of a model whose outputs are zero, in the unit of ``values``, ``(n,)``.

        They depend on the targets alone, not on the weights.

        Raises:
            LossCaptureError: if one is not known.
        """
        unknown = self.indices[torch.isnan(self._chance)]
        if len(unknown):
            raise LossCaptureError(
                f"The loss of a model that knows nothing is not known for examples {list_some(unknown)}. "
                "Pass forgotten_loss= (the loss from which an example counts as forgotten), or "
                "step='theory': the outputs behind the module's `influence_loss` could not be told."
            )
        return self._chance

    def mean(self) -> float:
        """Return the mean loss as training weighs it."""
        return float(self.values.sum() / self.weights.sum())

    def at(self, chosen: Tensor) -> Losses:
        """Return the losses of some of the examples."""
        keep = torch.isin(self.indices, chosen)
        columns = (self.indices, self.values, self.weights, self._chance, self.curvature)
        return Losses(*(column[keep] for column in columns))

    def with_values(self, values: Tensor) -> Losses:
        """Return the losses of the same examples at other weights of the model, where only values differ."""
        return Losses(self.indices, values, self.weights, self._chance, self.curvature)


class ValuePass:
    """Losses of some examples and nothing else, which is all that a step changes. It may run repeatedly.

    Batches like these have to have gone through a :class:`LossPass` or another pass that checks them.

    Args:
        data: the examples, whose new targets count; None for other data, of which all count.
        chosen: dataset indices of those to look at; all examples if None.
        plan: the editable layers, whose passes have checked such batches; None where none has.
    """

    description = "Edit: losses"

    def __init__(
        self, data: EditData | None, chosen: Tensor | None = None, plan: LayerPlan | None = None
    ) -> None:
        # The common case of batches that are used as they are takes no call.
        self._view = None if data is None or data.targets is None else data.view
        self._chosen = chosen
        self._verified = set() if plan is None else plan.verified
        self._parts: list[tuple[Tensor, ...]] = []

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        batch = batch if self._view is None else self._view(batch, indices)
        rows = self._find_rows(indices)
        self._parts.append((indices[rows], *self._read(module, batch, rows, len(indices))))

    def _find_rows(self, indices: Tensor) -> Tensor:
        if self._chosen is None:
            return torch.arange(len(indices))
        return torch.isin(indices, self._chosen).nonzero().flatten()

    def _read(self, module: Any, batch: Any, rows: Tensor, num_examples: int) -> tuple[Tensor, ...]:
        """Return what is kept of the chosen rows, on the CPU; the values come first."""
        return (compute_losses(module, batch, num_examples, verified=self._verified).cpu()[rows],)

    def take_values(self) -> Tensor:
        """Return the values in the order of the dataset, ``(n,)``, and be ready for another run.

        Raises:
            NonFiniteError: if a loss is NaN or infinite.
        """
        return self._take_columns()[1].double()

    def clear(self) -> None:
        """Drop what a run that failed has left."""
        self._parts.clear()

    def _take_columns(self) -> list[Tensor]:
        parts, self._parts = self._parts, []
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        order = columns[0].argsort(stable=True)
        columns = [column[order] for column in columns]
        if not bool(torch.isfinite(columns[1]).all()):
            raise NonFiniteError("A loss is NaN or infinite. Check the examples and the model's weights.")
        return columns


class LossPass(ValuePass):
    """Losses of some examples with their weights, the curvature in their outputs and those of chance.

    Args:
        plan: the editable layers.
        data: the examples, whose new targets count; None for other data, of which all count.
        chosen: dataset indices of those to look at; all examples if None.
    """

    def __init__(self, plan: LayerPlan, data: EditData | None, chosen: Tensor | None = None) -> None:
        super().__init__(data, chosen, plan)
        self._forward = Forward(plan)

    def _read(self, module: Any, batch: Any, rows: Tensor, num_examples: int) -> tuple[Tensor, ...]:
        captured = self._forward(module, batch, num_examples)
        values, loss = captured.per_example(), captured.loss
        self._take_graph(values, rows)
        values = values.detach()
        if loss is None or not loss.is_function_of_outputs:
            chance = torch.full_like(values, torch.nan)
        else:
            chance = loss.with_outputs(torch.zeros_like(loss.outputs)).per_example().detach()
        columns = (values, captured.weights, chance, trace_outputs(captured))
        return tuple(column.cpu()[rows] for column in columns)

    def _take_graph(self, values: Tensor, rows: Tensor) -> None:
        """Take in the losses ``(B,)`` of a batch, their graph alive, and the chosen rows ``(b,)``."""

    def result(self) -> Losses:
        """Return the losses in the order of the dataset.

        Raises:
            NonFiniteError: if a loss is NaN or infinite.
        """
        return Losses(*self._take_columns())


def trace_outputs(captured: Captured) -> Tensor:
    """Return the trace of each example's output curvature, ``(B,)``; ones where the outputs are unknown.

    With many outputs it is estimated from one label drawn from the model.
    """
    loss = captured.loss
    if loss is None:
        return torch.ones_like(captured.weights)
    if loss.num_columns <= MAX_COLUMNS:
        seeds: Iterable[Tensor] = loss.columns()
    else:
        generator = torch.Generator(device=loss.outputs.device).manual_seed(0)
        seeds = [loss.sample(generator)]
    total = torch.zeros_like(captured.weights)
    for seed in seeds:
        total += seed.reshape(captured.num_examples, -1).square().sum(dim=1)
    return total


@dataclass(frozen=True)
class Sample:
    """Examples that stand for more.

    Attributes:
        indices: of the dataset, ascending, ``(n,)``.
        coefficients: ``c``, ``(n,)``: the sum ``sum_n c_n H_n`` over them estimates a mean curvature, and
            ``sum_n c_n l_n`` a mean loss.
    """

    indices: Tensor
    coefficients: Tensor

    def find(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Find the sample's examples in a batch.

        Args:
            indices: dataset indices of the batch, ``(B,)``.

        Returns:
            Their rows and coefficients, ``(b,)`` each.
        """
        rows = torch.isin(indices, self.indices).nonzero().flatten()
        return rows, self.coefficients[torch.searchsorted(self.indices, indices[rows])]

    def times(self, factor: float) -> Sample:
        """Return the sample for a multiple of what this one stands for."""
        return Sample(self.indices, factor * self.coefficients)

    def mix(self, other: Sample, share: float) -> Sample:
        """Return the sample for ``1 - share`` times this mean curvature and ``share`` times another.

        Args:
            other: a sample of other examples.
            share: in [0, 1].
        """
        indices = torch.cat([self.indices, other.indices])
        coefficients = torch.cat([self.times(1 - share).coefficients, other.times(share).coefficients])
        order = indices.argsort()
        return Sample(indices[order], coefficients[order])


def take_most_curved(losses: Losses, limit: int | None, seed: int) -> Sample:
    """Choose the examples with the largest output curvature.

    The sum over them is scaled to the trace of the whole output curvature. Where all curve alike, as under
    squared error, the choice is random and the scale that of any random sample.

    Args:
        losses: of the examples to choose from, with the traces of their output curvature.
        limit: how many; None for all.
        seed: of the order among equals.

    Returns:
        The sample; all examples with one over their total weight if there are no more than the limit.
    """
    count, total = len(losses.indices), float(losses.weights.sum())
    scale = 1.0 / (total if total > 0 else count)
    if limit is None or count <= limit:
        return Sample(losses.indices, torch.full((count,), scale, dtype=torch.float64))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = order[losses.curvature[order].argsort(descending=True, stable=True)[:limit]].sort().values
    trace, weight = float(losses.curvature[chosen].sum()), float(losses.weights[chosen].sum())
    if trace > 0:
        scale *= float(losses.curvature.sum()) / trace
    else:
        scale = 1.0 / (weight if weight > 0 else limit)
    return Sample(losses.indices[chosen], torch.full((limit,), scale, dtype=torch.float64))


def draw_sample(losses: Losses, limit: int | None, seed: int) -> Sample:
    """Draw examples whose sum is an unbiased estimate of the mean, whatever is summed.

    Three in four are drawn by their share of the output curvature and one by its weight, by systematic
    sampling, and an example counts as much more as it was unlikely (Horvitz & Thompson 1952). The fourth
    bounds how much that is: an example that does not curve now may do so further on (Hesterberg 1995).

    Args:
        losses: of the examples to choose from, with the traces of their output curvature.
        limit: how many; None for all.
        seed: of the draw.

    Returns:
        The sample; all examples with one over their total weight if there are no more than the limit.
    """
    count, total = len(losses.indices), float(losses.weights.sum())
    if limit is None or count <= limit or total <= 0:
        return take_most_curved(losses, limit, seed)
    trace = losses.curvature.sum().clamp_min(torch.finfo(torch.float64).tiny)
    chances = _find_inclusion_chances(3 * losses.curvature / trace + losses.weights / total, limit)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    # The chances of all examples in random order, laid end to end, make a line as long as the sample; a point
    # at the same place of each of its unit lengths draws the example that it falls on.
    ends = chances[order].cumsum(0) - torch.rand(1, generator=generator, dtype=torch.float64)
    hits = ends.ceil().diff(prepend=torch.zeros(1, dtype=torch.float64)) > 0
    chosen = order[hits].sort().values
    return Sample(losses.indices[chosen], 1.0 / (total * chances[chosen]))


def _find_inclusion_chances(sizes: Tensor, limit: int) -> Tensor:
    """Return chances in [0, 1], in proportion to sizes up to where they are 1, that add up to a number."""
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    while True:
        rest = torch.where(certain, 0.0, sizes)
        scaled = rest * ((limit - int(certain.sum())) / float(rest.sum()))
        more = scaled >= 1
        if not bool(more.any()):
            return torch.where(certain, 1.0, scaled)
        certain |= more
        if not bool((sizes[~certain] > 0).any()):
            return certain.to(sizes)
