"""Matrix products and Einstein sums in which one operand is a weight and the other the batch's."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_influence.model.uses.calls import tensors_of
from lightning_influence.model.uses.operations.registry import ExampleCall, register_operation
from lightning_influence.model.uses.parts import Part, Product


@register_operation(
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.bmm,
    torch.Tensor.bmm, arguments=("input", "other"),
)  # fmt: skip
def pull_matmul(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back a product with a matrix on either side, or with one for each of several groups.

    Args:
        call: of ``matmul(input, other)``.

    Returns:
        Products of inputs and output gradients.
    """
    if len(call.sources()) != 1:
        return None
    (name,) = call.sources()
    return _pull_right(call, name) if name == "other" else _pull_left(call, name)


def _pull_right(call: ExampleCall, name: str) -> Mapping[str, Part] | None:
    """Return gradients of ``W`` in ``x W``, with ``W (D_in, D_out)`` or ``(G, D_in, D_out)``."""
    if not call.has_place("input") or call.get("input").ndim < 2:
        return None
    x, shape = call.examples("input"), call.get(name).shape
    return _pair(name, x, call.gradient(), shape, plain=False)


def _pull_left(call: ExampleCall, name: str) -> Mapping[str, Part] | None:
    """Return gradients of ``W`` in ``W x``, with ``W (D_out, D_in)`` or ``(G, D_out, D_in)``."""
    if not call.has_place("other") or call.get("other").ndim < 2:
        return None
    x, shape = call.examples("other"), call.get(name).shape
    return _pair(name, x.transpose(-1, -2), call.gradient().transpose(-1, -2), shape, plain=True)


def _pair(
    name: str, x: Tensor, gradient: Tensor, shape: torch.Size, plain: bool
) -> Mapping[str, Part] | None:
    """Pair inputs ``(B, ..., R, D_in)`` with gradients ``(K, B, ..., R, D_out)``, group by group.

    Returns:
        The product under the weight's name, or None if the groups were broadcast.
    """
    order: tuple[int, ...]
    K, B, d_in, d_out = len(gradient), len(x), x.shape[-1], gradient.shape[-1]
    sizes: tuple[int, ...] = (d_out, d_in)
    if len(shape) == 2:
        order = (0, 1) if plain else (1, 0)
        inputs, outputs = x.reshape(1, B, -1, d_in), gradient.reshape(K, 1, B, -1, d_out)
    elif len(shape) == 3 and x.ndim >= 4 and x.shape[-3] == gradient.shape[-3] == shape[0]:
        groups, sizes = shape[0], (shape[0], d_out, d_in)
        order = (0, 1, 2) if plain else (0, 2, 1)
        inputs = x.movedim(-3, 0).reshape(groups, B, -1, d_in)
        outputs = gradient.movedim(-3, 1).reshape(K, groups, B, -1, d_out)
    else:
        return None
    if inputs.shape[2] != outputs.shape[3]:
        return None
    return {name: Product(inputs.to(outputs.dtype), outputs, shape, sizes, order)}


@register_operation(torch.einsum, torch.functional.einsum, arguments=("equation", "first", "second"))
def pull_einsum(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back an Einstein sum of a weight and a tensor of the batch that is a matrix product in disguise.

    Letters of the weight are inputs (summed with the batch's tensor), outputs (in the result alone) or groups
    (in both); all other letters of the result are positions.

    Args:
        call: of ``einsum("...", x, w)`` with the operands in either order.

    Returns:
        The product of inputs and output gradients.
    """
    slots = [slot for slot in tensors_of(call.use.call)]
    equation = call.get("equation")
    if len(slots) != 2 or not isinstance(equation, str) or len(call.use.sources) != 1:
        return None
    (source,) = call.use.sources
    batch = slots[1 - slots.index(source)]
    terms = _letters(equation, slots.index(source))
    place = call.use.places.get(batch)
    out = call.use.outputs[0]
    if terms is None or place is None or place.dim is None or out is None or out.dim is None:
        return None
    weight, data, result = terms
    if data[place.dim] != result[out.dim]:
        return None
    tensors = tensors_of(call.use.call)
    x = place.split(tensors[batch], call.num_examples)
    roles = _roles(weight, data, result)
    if roles is None:
        return None
    groups, outputs, inputs = roles
    positions = [letter for letter in result if letter in data and letter not in weight]
    idle = [1 + at for at, letter in enumerate(data) if letter not in weight and letter not in result]
    if idle:
        x, data = x.sum(dim=idle), [letter for letter in data if letter in weight or letter in result]
    shape = tensors[source].shape
    size = dict(zip(weight, shape, strict=True))
    gradient = call.gradient()
    order = [*groups, "0", *positions]
    left = _arrange(x, ["0", *data], [*order, *inputs])
    right = _arrange(gradient, ["1", "0", *result], ["1", *order, *outputs])
    count = [prod(size[letter] for letter in some) for some in (groups, outputs, inputs)]
    K, B = len(gradient), call.num_examples
    factors = [*groups, *outputs, *inputs]
    product = Product(
        left.reshape(count[0], B, -1, count[2]).to(right.dtype),
        right.reshape(K, count[0], B, -1, count[1]),
        shape,
        sizes=tuple(size[letter] for letter in factors),
        order=tuple(factors.index(letter) for letter in weight),
    )
    return {call.operation.arguments[_number(source)]: product}


def _number(slot: tuple[Any, ...]) -> int:
    return int(slot[1])


def _arrange(tensor: Tensor, letters: list[str], wanted: list[str]) -> Tensor:
    return tensor.permute([letters.index(letter) for letter in wanted])


def _letters(equation: str, source: int) -> tuple[list[str], list[str], list[str]] | None:
    """Return the letters of the weight, the other operand and the result; None for what is not served."""
    equation = equation.replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    operands, result = equation.split("->")
    terms = operands.split(",")
    if any(len(set(term)) != len(term) for term in [*terms, result]):
        return None
    return list(terms[source]), list(terms[1 - source]), list(result)


def _roles(
    weight: list[str], data: list[str], result: list[str]
) -> tuple[list[str], list[str], list[str]] | None:
    """Return the weight's letters that are groups, outputs and inputs; None if one is summed alone."""
    groups = [letter for letter in weight if letter in data and letter in result]
    outputs = [letter for letter in weight if letter not in data and letter in result]
    inputs = [letter for letter in weight if letter in data and letter not in result]
    return (groups, outputs, inputs) if len(groups) + len(outputs) + len(inputs) == len(weight) else None
