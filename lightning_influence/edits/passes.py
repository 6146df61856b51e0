"""Passes of an edit: what has to be nullified, where it acts, and the losses before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.edits.data import EditData
from lightning_influence.model.captured import Captured
from lightning_influence.model.forward import Forward
from lightning_influence.model.gradients import FactoredGradients, check_finite
from lightning_influence.model.losses.capture import LossCall, LossCapture
from lightning_influence.model.plan import LayerPlan, Layout
from lightning_influence.support.arguments import list_some
from lightning_influence.support.errors import LossCaptureError, NonFiniteError

MAX_COLUMNS = 64
"""Largest number of output columns of which each is used; beyond, random ones stand for all."""

Rows = Callable[[Tensor], Tensor]
"""Maps the dataset indices of a batch to the rows that a pass is about."""


def rows_of(chosen: Tensor) -> Rows:
    """Return the function that finds the rows of these examples."""
    return lambda indices: torch.isin(indices, chosen).nonzero().flatten()


def forward_if_weighted(forward: Forward, module: Any, batch: Any, num_examples: int) -> Captured | None:
    """Forward a batch, if any of its examples has weight in the loss: the mean over none of them is NaN.

    Args:
        forward: what runs the batch.
        module: the user's module.
        batch: the batch.
        num_examples: ``B``.

    Returns:
        The captured batch; None if all of its labels are ignored or of classes of weight zero.

    Raises:
        NonFiniteError: if a loss is NaN or infinite for another reason.
    """
    with LossCapture() as capture:
        try:
            return forward(module, batch, num_examples)
        except NonFiniteError:
            if any(_is_weightless(call, num_examples) for call in capture.calls):
                return None
            raise


def _is_weightless(call: LossCall, num_examples: int) -> bool:
    try:
        loss = call.read(num_examples)
    except LossCaptureError:
        return False
    return not bool(replace(loss, reduction="mean").weights().any())


class GradientSumPass:
    """Sums signed loss gradients of some examples, and what their channels see.

    Args:
        plan: the covered layers.
        data: the examples.
        chosen: dataset indices of those to sum over.
        old: factor of gradients at the training targets.
        new: factor of gradients at the new targets.
        channels: whether to sum what channels see and what pulls at them, for selection rules.
    """

    description = "Edit: gradients"

    def __init__(
        self,
        plan: LayerPlan,
        data: EditData,
        chosen: Tensor,
        *,
        old: float = 0.0,
        new: float = 0.0,
        channels: bool = True,
    ) -> None:
        self.forward = Forward(plan)
        self.layout = Layout.of(plan.layers)
        self.terms: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.channels: dict[str, Tensor] = {}
        self.examples = 0
        self._factors = {"old": old, "new": new}
        self._data, self._rows, self._by_channel = data, rows_of(chosen), channels

    @property
    def total(self) -> Tensor:
        """The signed sum over both targets, ``(P,)``."""
        return sum((factor * self.terms[name] for name, factor in self._factors.items()), torch.zeros(()))

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        rows = self._rows(indices)
        for name, factor in self._factors.items():
            if factor:
                seen = self._data.view(batch, indices) if name == "new" else batch
                captured = forward_if_weighted(self.forward, module, seen, len(indices))
                if captured is None:  # its examples had no part in training: relabelling gives them one
                    continue
                gradients = {key: layer.select(rows) for key, layer in captured.loss_gradients().items()}
                check_finite(gradients)
                self._add(name, factor, gradients, len(rows))
        if len(rows) and self._by_channel:
            self._add_inputs(gradients)
        self.examples += len(rows)

    def _add(self, name: str, factor: float, gradients: dict[str, FactoredGradients], count: int) -> None:
        like = next(iter(gradients.values())).inputs
        for key in self._factors:
            self.terms.setdefault(key, like.new_zeros(self.layout.numel))
        self.layout.add_combination(self.terms[name][None], gradients, like.new_ones(1, count, 1))
        for key, layer in gradients.items() if self._by_channel else ():
            # A mean over positions: channels are compared with others of their layer only.
            pulled = factor * layer.outputs[0].mean(dim=2).sum(dim=1)
            self.channels[key] = self.channels.get(key, torch.zeros_like(pulled)) + pulled

    def _add_inputs(self, gradients: dict[str, FactoredGradients]) -> None:
        for key, layer in gradients.items():
            fed = layer.inputs.mean(dim=2).sum(dim=1)
            self.inputs[key] = self.inputs.get(key, torch.zeros_like(fed)) + fed


class LossPass:
    """Losses of some examples, and the loss of a model that knows nothing of them.

    Args:
        plan: the covered layers.
        data: the examples, whose new targets count; None for other data, of which all count.
        chosen: dataset indices of those to look at.
        curvature: whether to measure the curvature in the outputs too.
    """

    description = "Edit: losses"

    def __init__(
        self,
        plan: LayerPlan,
        data: EditData | None,
        chosen: Tensor | None = None,
        *,
        curvature: bool = False,
    ) -> None:
        self.forward = Forward(plan)
        self._data, self._chosen, self._curvature = data, chosen, curvature
        self._parts: list[tuple[Tensor, ...]] = []
        self.knows_chance = True
        """Whether the loss of outputs of zero is known of all edited examples that were seen."""

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one batch."""
        seen = batch if self._data is None else self._data.view(batch, indices)
        captured = self.forward(module, seen, len(indices))
        rows = torch.arange(len(indices)) if self._chosen is None else rows_of(self._chosen)(indices)
        values = captured.per_example()
        self.take(values[rows.to(values.device)])
        losses, weights = values.detach().cpu(), captured.weights.cpu()
        chance = self._chance(captured, indices)
        traces = output_traces(captured).cpu() if self._curvature else torch.zeros_like(losses)
        self._parts.append((indices[rows], losses[rows], weights[rows], chance[rows], traces[rows]))

    def take(self, values: Tensor) -> None:
        """Take in the losses ``(b,)`` of the examples to look at, their graph alive."""

    def _chance(self, captured: Captured, indices: Tensor) -> Tensor:
        """Return losses at outputs of zero, ``(B,)``, those of edited examples from any pass.

        What `influence_loss` computes is told from its values. Where they are all zero nothing is, but the
        loss at outputs of zero depends on the targets alone: that of an earlier pass still holds.

        Returns:
            The losses; NaN where they are not known.
        """
        found = chance_losses(captured)
        if found is None:
            chance = torch.full((len(indices),), torch.nan, dtype=torch.float64)
        else:
            chance = found.cpu().double()
        if self._data is not None:
            rows = rows_of(self._data.edited)(indices)
            places = torch.searchsorted(self._data.edited, indices[rows])
            if found is not None:
                self._data.chance[places] = chance[rows]
            chance[rows] = self._data.chance[places]
            self.knows_chance &= not bool(torch.isnan(chance[rows]).any())
        return chance

    def result(self) -> Losses:
        """Return the losses in the order of the dataset.

        Raises:
            NonFiniteError: if a loss is NaN or infinite.
        """
        columns = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        order = columns[0].argsort(stable=True)
        indices, values, weights, chance, traces = (column[order] for column in columns)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError("A loss is NaN or infinite. Check the examples and the model's weights.")
        return Losses(indices, values, weights, chance, traces)


class Losses:
    """Losses of some examples.

    Attributes:
        indices: of the dataset, ascending, ``(n,)``.
        values: before division by the mean weight, ``(n,)``.
        weights: each example's weight in the mean, ``(n,)``.
        curvature: trace of the Hessian of each example's loss in its outputs; zero if it was not asked for.
    """

    def __init__(
        self, indices: Tensor, values: Tensor, weights: Tensor, chance: Tensor, curvature: Tensor
    ) -> None:
        self.indices, self.values, self.weights = indices, values.double(), weights.double()
        self._chance, self.curvature = chance.double(), curvature.double()

    @property
    def chance(self) -> Tensor:
        """Losses at outputs of zero, in the unit of ``values``, ``(n,)``.

        Raises:
            NonFiniteError: if one is not known, so that nothing can be said of these weights.
        """
        unknown = self.indices[torch.isnan(self._chance)]
        if len(unknown):
            raise NonFiniteError(
                f"The outputs behind `influence_loss` are not known at these weights, for examples "
                f"{list_some(unknown)}. Pass forgotten_loss= (the loss from which an example counts as "
                "forgotten)."
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


def chance_losses(captured: Captured) -> Tensor | None:
    """Return each example's loss if all outputs were zero, ``(B,)``; None where the outputs are unknown."""
    loss = captured.loss
    if loss is None or not loss.is_function_of_outputs:
        return None
    return loss.with_outputs(torch.zeros_like(loss.outputs)).per_example().detach()


def output_traces(captured: Captured) -> Tensor:
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
