"""Linear maps of the last dimension: every other dimension of an example is a position."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from lightning_influence.model.uses.operations.registry import ExampleCall, register_operation
from lightning_influence.model.uses.parts import Dense, Part, Product, bias_part, sum_to


@register_operation(functional.linear, arguments=("input", "weight", "bias"))
def pull_linear(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back ``x W^T + b`` with ``W (D_out, D_in)``.

    Args:
        call: of ``linear(input, weight, bias)``.

    Returns:
        Products of inputs and output gradients.
    """
    if not call.has_place("input") or call.has_place("weight") or call.get("weight").ndim != 2:
        return None
    B = call.num_examples
    gradient = call.gradient()
    outputs = gradient.reshape(len(gradient), 1, B, -1, gradient.shape[-1])
    parts: dict[str, Part] = {}
    if call.is_source("weight"):
        x = call.examples("input")
        inputs = x.reshape(1, B, -1, x.shape[-1]).to(outputs.dtype)
        parts["weight"] = Product(inputs, outputs, call.get("weight").shape)
    if call.is_source("bias"):
        parts["bias"] = bias_part(outputs, call.get("bias").shape, call.present("input"))
    return parts


@register_operation(torch.addmm, torch.Tensor.addmm, arguments=("input", "mat1", "mat2", "beta", "alpha"))
def pull_addmm(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back ``b + x W`` with ``W (D_in, D_out)``, as Conv1D of GPT-2 has it.

    Args:
        call: of ``addmm(bias, x, weight)``.

    Returns:
        Products of inputs and output gradients.
    """
    plain = call.get("beta", 1) == call.get("alpha", 1) == 1
    if not plain or not call.has_place("mat1") or call.has_place("mat2") or call.has_place("input"):
        return None
    B = call.num_examples
    gradient = call.gradient()
    outputs = gradient.reshape(len(gradient), 1, B, -1, gradient.shape[-1])
    parts: dict[str, Part] = {}
    if call.is_source("mat2"):
        x, shape = call.examples("mat1"), call.get("mat2").shape
        inputs = x.reshape(1, B, -1, x.shape[-1]).to(outputs.dtype)
        parts["mat2"] = Product(inputs, outputs, shape, sizes=(shape[1], shape[0]), order=(1, 0))
    if call.is_source("input"):
        shape = call.get("input").shape
        if len(shape) == 1 and shape[0] == outputs.shape[-1]:
            parts["input"] = bias_part(outputs, shape, call.present("mat1"))
        else:
            parts["input"] = Dense(sum_to(gradient, shape))
    return parts


@register_operation(functional.bilinear, arguments=("input1", "input2", "weight", "bias"))
def pull_bilinear(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back ``x1^T W_o x2 + b``: linear in the products of the two inputs' entries.

    Args:
        call: of ``bilinear(input1, input2, weight, bias)``.

    Returns:
        Products of these and output gradients.
    """
    if not (call.has_place("input1") and call.has_place("input2")) or call.has_place("weight"):
        return None
    B = call.num_examples
    gradient = call.gradient()
    outputs = gradient.reshape(len(gradient), 1, B, -1, gradient.shape[-1])
    parts: dict[str, Part] = {}
    if call.is_source("weight"):
        left, right = call.examples("input1"), call.examples("input2")
        left, right = left.reshape(B, -1, left.shape[-1]), right.reshape(B, -1, right.shape[-1])
        inputs = torch.einsum("bri,brj->brij", left, right).flatten(2)[None].to(outputs.dtype)
        parts["weight"] = Product(inputs, outputs, call.get("weight").shape)
    if call.is_source("bias"):
        parts["bias"] = bias_part(outputs, call.get("bias").shape)
    return parts
