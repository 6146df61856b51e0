"""Gradients of small sets of examples, of all processes, in the order of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.methods.context import Context
from lightning_influence.model.finite import check_finite
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import (
    DenseGradients,
    FactoredGradients,
    LayerGradients,
    compact,
    concatenate,
)
from lightning_influence.model.layers.layer import Layer
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.layers.table_gradients import TableGradients
from lightning_influence.model.measure import Measure
from lightning_influence.support.errors import NonFiniteError
from lightning_influence.support.passes import Loader, Passes
from lightning_influence.support.waiting import read_later


class GradientPass:
    """Collects the gradient of a measurement (the loss if None) on every example of a loader.

    Args:
        plan: the covered layers.
        measure: what to differentiate; None for the training loss.
        description: label of the progress bar.
        dtype: precision the gradients are kept in; that of the model if None.
        only: dataset indices of the examples to keep, ``(M,)``; all of them if None.
    """

    def __init__(
        self,
        plan: LayerPlan,
        measure: Measure | None = None,
        *,
        description: str = "Influence: query gradients",
        dtype: torch.dtype | None = None,
        only: Tensor | None = None,
    ) -> None:
        self.description = description
        self._indices: list[Tensor] = []
        self._dataloaders: list[Tensor] = []
        self._measure = measure
        self._dtype, self._only = dtype, only
        self._parts: list[dict[str, LayerGradients]] = []
        self.forward = Forward(plan)
        self._plan = plan

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Collect one batch.

        Raises:
            NonFiniteError: if a measurement is NaN or infinite.
        """
        gradients = differentiate(self.forward, module, batch, indices, self._measure)
        if self._only is not None:
            rows = torch.isin(indices, self._only).nonzero().flatten()
            if not len(rows):
                return
            indices = indices[rows]
            gradients = {
                name: layer.select(rows.to(layer.like.device, non_blocking=True))
                for name, layer in gradients.items()
            }
        self._parts.append({
            name: compact(layer, smaller=True).to(dtype=self._dtype) for name, layer in gradients.items()
        })
        self._indices.append(indices)
        self._dataloaders.append(torch.full_like(indices, dataloader_idx))

    @property
    def gradients(self) -> dict[str, LayerGradients]:
        """Gradients of all examples in the order seen, ``K = 1``, by layer; zero where it took no part."""
        return {name: concatenate(self._blocks(name)) for name in self._names()}

    def collect(self) -> dict[str, LayerGradients]:
        """Return :attr:`gradients` and keep none: never two copies of more than one layer in memory."""
        result: dict[str, LayerGradients] = {}
        for name in self._names():
            result[name] = concatenate(self._blocks(name))
            for part in self._parts:
                part.pop(name, None)
        return result

    def _names(self) -> list[str]:
        return [name for name in self._plan.layers if any(name in part for part in self._parts)]

    def _blocks(self, name: str) -> list[LayerGradients]:
        """Return a layer's gradients batch by batch."""
        like = next(part[name] for part in self._parts if name in part)
        return [
            part[name] if name in part else like.blank(len(indices))
            for part, indices in zip(self._parts, self._indices, strict=True)
        ]

    @property
    def indices(self) -> Tensor:
        """Dataset indices in the order seen, ``(Q,)``."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._indices])

    @property
    def dataloaders(self) -> Tensor:
        """Which loader each example is from, ``(Q,)``."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._dataloaders])


def differentiate(
    forward: Forward, module: Any, batch: Any, indices: Tensor, measure: Measure | None
) -> dict[str, LayerGradients]:
    """Differentiate a measurement (the loss if None) on every example of a batch.

    Args:
        forward: of the pass.
        module: the user's module.
        batch: the batch.
        indices: dataset indices of its examples, ``(B,)``.
        measure: what to differentiate.

    Returns:
        Gradients by layer, ``K = 1``.

    Raises:
        NonFiniteError: if a measurement or a gradient is NaN or infinite.
    """
    captured = forward(module, batch, len(indices), measure)
    values = captured.per_example()
    if measure is None:
        gradients = captured.loss_gradients(keep_graph=False)
    else:
        gradients = captured.gradients_of(values, keep_graph=False)

    def take(finite: Tensor) -> None:
        bad = indices[~finite].tolist()
        if bad:
            raise NonFiniteError(
                f"The measurement is not finite for {len(bad)} examples (dataset indices {bad[:5]}). Check "
                "these examples and the model's weights for NaN or infinity."
            )

    read_later(torch.isfinite(values.detach()), take)
    check_finite(gradients)
    return gradients


@dataclass(frozen=True)
class Gathered:
    """Gradients by layer, dataset indices ``(B,)`` and loader of each ``(B,)``, the same on every process.

    Where processes own layers, each has the gradients of its own.
    """

    gradients: dict[str, LayerGradients]
    indices: Tensor
    dataloaders: Tensor

    def select(self, rows: slice) -> Gathered:
        """Return some of them."""
        gradients = {name: layer.select(rows) for name, layer in self.gradients.items()}
        return Gathered(gradients, self.indices[rows], self.dataloaders[rows])


def gather(context: Context, one_pass: GradientPass, loaders: Sequence[Loader]) -> Gathered:
    """Run a pass and join what all processes have collected.

    Args:
        context: runs the pass.
        one_pass: a pass that has not run yet.
        loaders: what it visits.

    Returns:
        Everything in the order in which one process alone would have visited it.
    """
    runner = context.runner
    runner.run(one_pass, list(loaders))
    gradients, indices, dataloaders = one_pass.collect(), one_pass.indices, one_pass.dataloaders
    if runner.world_size == 1:
        return Gathered(gradients, indices, dataloaders)
    forms = _forms(context, gradients, len(indices))
    joined, own = {}, context.own_layers
    for name, form in forms.items():
        layer = context.plan.layers[name]
        local = _in_form(layer, gradients.pop(name, None), len(indices), form, context)
        everyones = _join(runner, local)
        if name in own:
            joined[name] = everyones
    indices, dataloaders = runner.all_gather_cat(indices), runner.all_gather_cat(dataloaders)
    order = _visiting_order(loaders, indices, dataloaders)
    on_device = order.to(context.device)
    joined = {name: layer.select(on_device) for name, layer in joined.items()}
    return Gathered(joined, indices[order], dataloaders[order])


def gather_examples(
    context: Context, loader: Loader, chosen: Tensor, description: str, *, in_batches: bool = False
) -> dict[str, LayerGradients]:
    """Collect the loss gradients of some of a loader's examples, on every process.

    Args:
        context: runs the pass.
        loader: whose examples they are.
        chosen: their dataset indices, ``(M,)``.
        description: label of the progress bar.
        in_batches: whether the loader's batches that hold them are read as they are, because weights may be
            shares of a batch; otherwise the examples may be put together anew.

    Returns:
        By layer the gradients of the ``M`` examples in the order in which they were chosen, ``K = 1``.
    """
    one_pass = GradientPass(context.plan, description=description, only=chosen)
    holding = loader.with_any(chosen) if in_batches else loader.holding(chosen)
    found = gather(context, one_pass, [holding])
    by_index = found.indices.argsort()
    rows = by_index[torch.searchsorted(found.indices[by_index], chosen)].to(context.device)
    return {name: found.gradients.pop(name).select(rows) for name in list(found.gradients)}


def join_rows(context: Context, own: dict[str, Tensor], rows: range) -> Gathered:
    """Sum over the processes what each has of some rows of gradients.

    Args:
        context: knows the processes, and which layers this one owns.
        own: by layer ``(rows, G, D_out, D_in)``; let go of on the way.
        rows: positions of the rows.

    Returns:
        One gradient a row; their positions stand in place of dataset indices.
    """
    runner = context.runner
    heard = runner.all_reduce_sum(torch.tensor([float(name in own) for name in context.plan.layers]))
    gradients: dict[str, LayerGradients] = {}
    for (name, layer), count in zip(context.plan.layers.items(), heard.tolist(), strict=True):
        if not count:
            continue
        part = own.pop(name, None)
        if part is None:
            part = torch.zeros(len(rows), *layer.shape, device=context.device, dtype=context.dtype)
        total = runner.all_reduce_sum(part)
        if name in context.own_layers:
            gradients[name] = DenseGradients(total[None])
    positions = torch.tensor([*rows])
    return Gathered(gradients, positions, torch.zeros_like(positions))


_ABSENT, _DENSE, _FACTORED, _TABLE = range(4)


def _describe(gradients: LayerGradients | None) -> tuple[int, int, int]:
    """Return the form of some gradients: its kind, and the positions of the products and of the rows."""
    if isinstance(gradients, TableGradients):
        return _TABLE, gradients.products.inputs.shape[2], gradients.rows.shape[1]
    if isinstance(gradients, FactoredGradients):
        return _FACTORED, gradients.inputs.shape[2], 0
    return (_ABSENT if gradients is None else _DENSE), 0, 0


def _forms(
    context: Context, gradients: dict[str, LayerGradients], count: int
) -> dict[str, tuple[int, int, int]]:
    """Agree on one form a layer.

    Returns:
        The form of each layer that some process has gradients of, see :func:`_describe`.
    """
    kinds = [[*_describe(gradients.get(name)), count] for name in context.plan.layers]
    everyone = context.runner.all_gather_cat(torch.tensor([kinds])).tolist()
    forms = {}
    for number, name in enumerate(context.plan.layers):
        present = [process[number] for process in everyone if process[number][0] != _ABSENT]
        own = {(kind, positions, rows) for kind, positions, rows, examples in present if examples}
        if not present:
            continue
        if own and all(kind == _TABLE for kind, _, _ in own):  # padded to the largest
            forms[name] = (_TABLE, *map(max, zip(*((positions, rows) for _, positions, rows in own))))  # noqa: B905
        else:
            forms[name] = own.pop() if len(own) == 1 else (_DENSE, 0, 0)
    return forms


def _in_form(
    layer: Layer, gradients: LayerGradients | None, count: int, form: tuple[int, int, int], context: Context
) -> LayerGradients:
    """This process's gradients of one layer in the agreed form; zeros where it has none.

    Returns:
        Gradients of ``count`` examples.
    """
    kind, positions, rows = form
    zeros = torch.zeros((), device=context.device, dtype=context.dtype).new_zeros
    groups, d_out, d_in = layer.shape
    if kind == _DENSE:
        return DenseGradients(zeros(1, count, *layer.shape) if gradients is None else gradients.dense())
    if gradients is None or gradients.num_examples == 0 or kind == _TABLE:
        inputs, outputs = zeros(groups, count, positions, d_in), zeros(1, groups, count, positions, d_out)
        factored = FactoredGradients(inputs, outputs)
        if kind == _FACTORED:
            return factored
        if isinstance(gradients, TableGradients):
            return gradients.padded(rows, positions)
        none = torch.zeros(count, rows, dtype=torch.int64, device=context.device)
        return TableGradients(none, zeros(1, count, rows, d_in), factored)
    return gradients


def _join(runner: Passes, layer: LayerGradients) -> LayerGradients:
    def along(tensor: Tensor, dim: int) -> Tensor:
        return runner.all_gather_cat(tensor.transpose(0, dim).contiguous()).transpose(0, dim).contiguous()

    if isinstance(layer, TableGradients):
        products = _join(runner, layer.products)
        assert isinstance(products, FactoredGradients)
        return TableGradients(along(layer.rows, 0), along(layer.values, 1), products)
    if isinstance(layer, FactoredGradients):
        return FactoredGradients(along(layer.inputs, 1), along(layer.outputs, 2))
    return DenseGradients(along(layer.dense(), 1))


def _visiting_order(loaders: Sequence[Loader], indices: Tensor, dataloaders: Tensor) -> Tensor:
    """Return where each example comes when one process visits the loaders one after the other."""
    place, start = torch.empty_like(indices), 0
    for number, loader in enumerate(loaders):
        mine = (dataloaders == number).nonzero().flatten()
        visited = loader.indices
        by_index = visited.argsort()
        place[mine] = start + by_index[torch.searchsorted(visited[by_index], indices[mine])]
        start += len(visited)
    return place.argsort()
