"""Gradients of measurements of whole batches: one number for a set of examples, such as a gap between groups.

Such a number may couple the examples in any way, so that it has no value of an example. Its gradient in the
parameters is that of autograd, the sum over whatever the batch's examples add to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.methods.context import Context
from lightning_influence.methods.gathering import Gathered, join_rows
from lightning_influence.methods.groups import Groups
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.measurements import ResolvedMeasurement
from lightning_influence.support.arguments import list_some
from lightning_influence.support.errors import NonFiniteError, UnsupportedModelError
from lightning_influence.support.passes import Loader, Passes


class _ShapePass:
    """Sees whether a measurement gives one number for a batch."""

    description = "Influence: measurement"

    def __init__(self, measured: ResolvedMeasurement) -> None:
        self.found = 0
        self._measured = measured

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Measure one batch; what is wrong with the values is told by the passes that need them."""
        assert self._measured.function is not None
        values = self._measured.function(module, batch)
        self.found += isinstance(values, Tensor) and values.ndim == 0


def gives_one_number(runner: Passes, measured: ResolvedMeasurement, loader: Loader) -> bool:
    """Return whether a measurement gives one number for the first batch of a loader, not one an example."""
    if measured.function is None:
        return False
    one_pass, whole = _ShapePass(measured), loader.in_batches()
    runner.run(one_pass, whole.with_any(whole.batches[0]))
    return bool(runner.all_reduce_sum(torch.tensor([float(one_pass.found)])))


class SetGradientPass:
    """Averages the gradients of a measurement of sets over some groups of sets.

    Args:
        plan: the covered layers.
        measured: a measurement that gives one number for a batch.
        groups: of all batches, by their positions in their loaders.
        rows: positions of the groups to average over, one after the other.
        loaders: the loaders that the pass visits, by their positions in ``groups``.
        dtype: precision the means are kept in.

    Attributes:
        means: by layer ``(rows, G, D_out, D_in)``, this process's part of them.
    """

    description = "Influence: query gradients"

    def __init__(
        self,
        plan: LayerPlan,
        measured: ResolvedMeasurement,
        groups: Groups,
        *,
        rows: range,
        loaders: dict[int, Loader],
        dtype: torch.dtype,
    ) -> None:
        self.means: dict[str, Tensor] = {}
        self._plan, self._measured, self._dtype = plan, measured, dtype
        self._rows, self._shares = rows, 1.0 / groups.counts.to(dtype)
        self._places = [
            {
                int(batch[0]): group
                for batch, group in zip(loader.batches, groups.members[number][1].tolist(), strict=True)
            }
            for number, loader in loaders.items()
        ]

    def step(self, module: Any, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Add one set.

        Raises:
            NonFiniteError: if its value or a gradient is NaN or infinite.
            UnsupportedModelError: if it does not depend on the covered layers.
        """
        group = self._places[dataloader_idx][int(indices[0])]
        value = self._measured.of_set(module, batch)
        found = _differentiate(value, self._plan)
        if not all(bool(torch.isfinite(part).all()) for part in (value, *found.values())):
            raise NonFiniteError(
                f"{self._measured.hint} is {value.item():.4g} for the batch of dataset indices "
                f"{list_some(indices)}, and it or its gradient is not finite. Accepted are batches for which "
                "it is defined: each has to have examples of every group that it compares."
            )
        if not found:
            raise UnsupportedModelError(
                f"{self._measured.hint} does not depend on the parameters of any covered layer: "
                f"{sorted(self._plan.layers)[:8]}."
            )
        for name, gradient in found.items():
            if name not in self.means:
                self.means[name] = gradient.new_zeros(len(self._rows), *gradient.shape, dtype=self._dtype)
            share = self._shares[group].item()
            self.means[name][group - self._rows.start] += share * gradient.to(self._dtype)


def _differentiate(value: Tensor, plan: LayerPlan) -> dict[str, Tensor]:
    """Return the gradient ``(G, D_out, D_in)`` of a number in each layer that it depends on."""
    parameters: dict[str, list[Tensor]] = {}
    for name, layer in plan.layers.items():
        own_bias = layer.rule.bias(layer.module) if layer.has_bias else None
        parameters[name] = [layer.rule.weight(layer.module), *([] if own_bias is None else [own_bias])]
    flat = [parameter for own in parameters.values() for parameter in own]
    with _without_hooks(flat):
        grads = iter(torch.autograd.grad(value, flat, allow_unused=True))
    result = {}
    for name, own in parameters.items():
        given = [(parameter, next(grads)) for parameter in own]
        if any(grad is not None for _, grad in given):
            weight, *bias = [
                torch.zeros_like(parameter) if grad is None else grad.to_dense() for parameter, grad in given
            ]
            result[name] = plan.layers[name].from_parameters(weight, bias[0] if bias else None)
    return result


@contextlib.contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A context without the hooks that change gradients of parameters: influence is of those before them."""
    hooks = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    try:
        for parameter, _ in hooks:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, own in hooks:
            parameter._backward_hooks = own


def gather_sets(
    context: Context, measured: ResolvedMeasurement, loaders: Sequence[Loader], groups: Groups, rows: range
) -> Gathered:
    """Differentiate a measurement on sets, averaged by group, and join what all processes have seen.

    Args:
        context: runs the pass.
        measured: a measurement that gives one number for a batch.
        loaders: of all sets, each a batch that stays whole.
        groups: of all batches, by their positions in their loaders.
        rows: positions of the groups.

    Returns:
        One gradient a group; their positions stand in place of dataset indices.
    """
    visited: dict[int, Loader] = {}
    for number, (loader, (_, own)) in enumerate(zip(loaders, groups.members, strict=True)):
        wanted = [group in rows for group in own.tolist()]
        if any(wanted):
            firsts = [batch[:1] for batch, is_wanted in zip(loader.batches, wanted, strict=True) if is_wanted]
            visited[number] = loader if all(wanted) else loader.with_any(torch.cat(firsts))
    one_pass = SetGradientPass(
        context.plan,
        measured,
        groups,
        rows=rows,
        loaders={number: loaders[number] for number in visited},
        dtype=context.dtype,
    )
    context.runner.run(one_pass, list(visited.values()))
    return join_rows(context, one_pass.means, rows)
