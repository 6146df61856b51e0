"""Convolutions and transposed ones: every pixel is a position, every group a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from lightning_influence.model.uses.operations.registry import ExampleCall, register_operation
from lightning_influence.model.uses.parts import Part, Product, bias_part


@register_operation(
    torch.conv1d, torch.conv2d, torch.conv3d,
    arguments=("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
)  # fmt: skip
def pull_convolution(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back a convolution: a linear map of what each output pixel sees.

    Args:
        call: of ``convNd(input, weight, bias, stride, padding, dilation, groups)``.

    Returns:
        Products of patches and output gradients.
    """
    if call.has_place("weight") or not call.has_place("input"):
        return None
    shape, groups = call.get("weight").shape, call.get("groups", 1)
    kernel, spatial = shape[2:], len(shape) - 2
    stride = _each(call.get("stride", 1), spatial)
    dilation = _each(call.get("dilation", 1), spatial)
    gradient = _batched(call.gradient(), spatial, 2)  # (K, B, m, C, *spatial)
    outputs = _positions(gradient, groups)
    parts: dict[str, Part] = {}
    if call.is_source("weight"):
        x = _batched(call.examples("input"), spatial, 1)
        B, each = x.shape[:2]
        padded = functional.pad(x.flatten(0, 1), _padding(call.get("padding", 0), kernel, dilation))
        seen = _patches(padded, kernel, stride, dilation)  # (B m, *out, C, *kernel)
        d_in = prod(shape[1:])
        inputs = seen.reshape(B, each * prod(seen.shape[1 : 1 + spatial]), groups, d_in).permute(2, 0, 1, 3)
        parts["weight"] = Product(inputs.to(outputs.dtype), outputs, shape)
    if call.is_source("bias"):
        parts["bias"] = bias_part(outputs, call.get("bias").shape)
    return parts


@register_operation(
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    arguments=("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
)  # fmt: skip
def pull_transposed_convolution(call: ExampleCall) -> Mapping[str, Part] | None:
    """Pull back a transposed convolution: each input pixel adds to a patch of outputs.

    Args:
        call: of ``conv_transposeNd(input, weight, bias, stride, padding, output_padding, groups, dilation)``.

    Returns:
        Products of input pixels and the patches of output gradients that they reach.
    """
    if call.has_place("weight") or not call.has_place("input"):
        return None
    shape, groups = call.get("weight").shape, call.get("groups", 1)
    kernel, spatial = shape[2:], len(shape) - 2
    gradient = _batched(call.gradient(), spatial, 2)
    parts: dict[str, Part] = {}
    if call.is_source("weight"):
        x = _batched(call.examples("input"), spatial, 1)
        inputs = _positions(x[None], groups)[0]  # (G, B, R, C_in / G)
        padding = _each(call.get("padding", 0), spatial)
        padded = functional.pad(gradient.flatten(0, 2), [pad for pad in reversed(padding) for _ in range(2)])
        stride, dilation = _each(call.get("stride", 1), spatial), _each(call.get("dilation", 1), spatial)
        seen = _patches(padded, kernel, stride, dilation, x.shape[3:])
        K, B, each = gradient.shape[:3]
        d_out = prod(shape[1:])
        outputs = seen.reshape(K, B, each * prod(x.shape[3:]), groups, d_out).permute(0, 3, 1, 2, 4)
        sizes = (groups, d_out, shape[0] // groups)
        parts["weight"] = Product(inputs.to(outputs.dtype), outputs, shape, sizes=sizes, order=(0, 2, 1))
    if call.is_source("bias"):
        parts["bias"] = bias_part(_positions(gradient, groups), call.get("bias").shape)
    return parts


def _batched(tensor: Tensor, spatial: int, lead: int) -> Tensor:
    """Return ``(*lead, m, C, *spatial)``: a call without a dimension for the batch is a batch of one."""
    return tensor.unsqueeze(lead) if tensor.ndim == lead + 1 + spatial else tensor


def _positions(tensor: Tensor, groups: int) -> Tensor:
    """Return ``(K, B, m, C, *spatial)`` as ``(K, G, B, R, C / G)``."""
    K, B, each, channels = tensor.shape[:4]
    pixels = tensor.reshape(K, B, each, groups, channels // groups, -1)
    return pixels.permute(0, 3, 1, 2, 5, 4).reshape(K, groups, B, -1, channels // groups)


def _each(value: int | Sequence[int], spatial: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values


def _padding(padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return the amounts for :func:`torch.nn.functional.pad`, last dimension first."""
    spatial = len(kernel)
    if padding == "valid":
        return [0] * 2 * spatial
    if padding == "same":
        reach = [each * (size - 1) for each, size in zip(dilation, kernel, strict=True)]
        return [amount for each in reversed(reach) for amount in (each // 2, each - each // 2)]
    assert not isinstance(padding, str)
    return [amount for amount in reversed(_each(padding, spatial)) for _ in range(2)]


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int] | None = None,
) -> Tensor:
    """Return what each pixel of a convolution's output sees, ``(B', *out, C, *kernel)``, as a view.

    Args:
        x: padded inputs ``(B', C, *spatial)``.
        kernel: the kernel's size.
        stride: from pixel to pixel of the output.
        dilation: from pixel to pixel of the kernel.
        out: size of the output, if it is smaller than what fits.
    """
    sizes = x.shape[2:]
    axes = list(zip(sizes, kernel, stride, dilation, strict=True))
    fits = [(size - each * (length - 1) - 1) // step + 1 for size, length, step, each in axes]
    count = fits if out is None else list(out)
    strides = x.stride()
    steps = [own * step for own, step in zip(strides[2:], stride, strict=True)]
    inner = [own * each for own, each in zip(strides[2:], dilation, strict=True)]
    shape = (x.shape[0], *count, x.shape[1], *kernel)
    return x.as_strided(shape, (strides[0], *steps, strides[1], *inner), x.storage_offset())
