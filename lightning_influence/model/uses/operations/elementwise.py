"""Additions and multiplications: scales, shifts, tables of positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.model.uses.operations.registry import ExampleCall, register_operation
from lightning_influence.model.uses.parts import Dense, Part, sum_to


def aligned(call: ExampleCall, name: str) -> Tensor:
    """Return an operand split by examples, ``(B, ...)``, with as many dimensions as the output has."""
    gradient = call.gradient()
    value = call.get(name)
    if not isinstance(value, Tensor):
        return torch.as_tensor(value, device=gradient.device)
    if not call.has_place(name):
        return value.detach()
    split = call.examples(name)
    missing = gradient.ndim - 1 - split.ndim
    return split.reshape(split.shape[0], *(1,) * missing, *split.shape[1:])


@register_operation(
    torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__radd__,
    arguments=("input", "other", "alpha"), reads_inputs=False,
)  # fmt: skip
def pull_add(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back a sum.

    Args:
        call: of ``add(input, other)``.

    Returns:
        The output's gradients, summed over what the operand was broadcast along.
    """
    factors = {"input": 1, "other": call.get("alpha", 1)}
    return {
        name: Dense(sum_to(call.gradient() * factors[name], call.get(name).shape)) for name in call.sources()
    }


@register_operation(
    torch.sub, torch.Tensor.sub, torch.Tensor.sub_,
    arguments=("input", "other", "alpha"), reads_inputs=False,
)  # fmt: skip
def pull_sub(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back a difference.

    Args:
        call: of ``sub(input, other)``.

    Returns:
        The output's gradients, summed over what the operand was broadcast along.
    """
    factors = {"input": 1, "other": -call.get("alpha", 1)}
    return {
        name: Dense(sum_to(call.gradient() * factors[name], call.get(name).shape)) for name in call.sources()
    }


@register_operation(
    torch.mul, torch.Tensor.mul, torch.Tensor.mul_, torch.Tensor.__rmul__, arguments=("input", "other")
)
def pull_mul(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back a product of elements.

    Args:
        call: of ``mul(input, other)``.

    Returns:
        The output's gradients times the other operand, summed over what the operand was broadcast along.
    """
    if len(call.sources()) != 1:
        return None
    (name,) = call.sources()
    other = aligned(call, "other" if name == "input" else "input")
    return {name: Dense(sum_to(call.gradient() * other, call.get(name).shape))}


@register_operation(torch.prelu, torch.Tensor.prelu, arguments=("input", "weight"))
def pull_prelu(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back the slope of negative inputs, one or one a channel.

    Args:
        call: of ``prelu(input, weight)``.

    Returns:
        The output's gradients times the negative inputs, summed over all but the channels.
    """
    slot = call.slot("input")
    place = call.use.places.get(slot)
    if place is None or place.dim == 1:
        return None
    weight, values = call.get("weight"), call.gradient() * call.examples("input").clamp(max=0)
    if weight.numel() == 1:
        return {"weight": Dense(values.flatten(2).sum(dim=2).reshape(*values.shape[:2], *weight.shape))}
    return {"weight": Dense(values.movedim(3, 2).flatten(3).sum(dim=3))}
