"""Convolutions in one, two and three dimensions: every output pixel is a position, every group a block."""

import itertools

from torch import Tensor, nn
from torch.nn import functional

from lightning_influence.layers.base import LayerRule
from lightning_influence.layers.registry import register

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(LayerRule):
    """``nn.ConvNd`` with any stride, dilation, groups, padding and padding mode."""

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """Return ``(groups, out_channels / groups, in_channels / groups * kernel pixels)``."""
        assert isinstance(module, _Conv)
        groups, kernel = module.groups, module.weight[0, 0].numel()
        return groups, module.out_channels // groups, module.in_channels // groups * kernel

    def inputs(self, module: nn.Module, x: Tensor, num_examples: int) -> Tensor:
        """Return patches ``(G, B, R, D_in)``: what each output pixel sees, after padding."""
        assert isinstance(module, _Conv)
        # Rows may be more than the examples: these may have been folded with a factor of their own.
        per_group = _patches(module, x).view(num_examples, -1, module.groups, self.shape(module)[2])
        return per_group.permute(2, 0, 1, 3)

    def output_gradients(self, module: nn.Module, grad: Tensor, num_examples: int) -> Tensor:
        """Return output gradients ``(G, B, R, D_out)``."""
        assert isinstance(module, _Conv)
        pixels = _batched(module, grad).flatten(2).transpose(1, 2)
        per_group = pixels.reshape(num_examples, -1, module.groups, module.out_channels // module.groups)
        return per_group.permute(2, 0, 1, 3)


def _patches(module: _Conv, x: Tensor) -> Tensor:
    """Return what each output pixel sees, ``(B', *out, C, *kernel)``: one copy a pixel of the kernel."""
    padded = _pad(module, x)
    axes = list(zip(padded.shape[2:], module.kernel_size, module.dilation, module.stride, strict=True))
    out = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, dilation, stride in axes]
    result = padded.new_empty(len(padded), *out, padded.shape[1], *module.kernel_size)
    for pixel in itertools.product(*map(range, module.kernel_size)):
        window = tuple(
            slice(at * dilation, at * dilation + (count - 1) * stride + 1, stride)
            for at, count, (_, _, dilation, stride) in zip(pixel, out, axes, strict=True)
        )
        seen = padded[(slice(None), slice(None), *window)]
        result[(..., *pixel)] = seen.movedim(1, -1)  # type: ignore[index]
    return result


def _batched(module: _Conv, x: Tensor) -> Tensor:
    """Return an unbatched call's tensor ``(C, *spatial)`` as a batch of one; others as they are."""
    return x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x


def _pad(module: _Conv, x: Tensor) -> Tensor:
    """Return the input as the kernel sees it: padded in the module's own mode."""
    spatial = len(module.kernel_size)
    x = _batched(module, x)
    amounts: list[int] = []
    for axis in reversed(range(spatial)):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        if module.padding == "same":
            amounts += [reach // 2, reach - reach // 2]
        elif module.padding == "valid":
            amounts += [0, 0]
        else:
            amounts += [int(module.padding[axis])] * 2
    if not any(amounts):
        return x
    if module.padding_mode == "zeros":
        return functional.pad(x, amounts)
    return functional.pad(x, amounts, mode=module.padding_mode)
