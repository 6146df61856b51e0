"""Convolutions in one, two and three dimensions: every output pixel is a position, every group a block."""

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
        patches = _pad(module, x)
        spatial = patches.ndim - 2
        for axis in range(spatial):
            reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
            patches = patches.unfold(2 + axis, reach, module.stride[axis])[..., :: module.dilation[axis]]
        # Now (B', C, *out, *kernel); examples may have been folded into the rows with a factor of their own.
        channels = list(range(1, 2)) + list(range(2 + spatial, 2 + 2 * spatial))
        order = [0, *range(2, 2 + spatial), *channels]
        flat = patches.permute(order)
        per_group = flat.reshape(num_examples, -1, module.groups, self.shape(module)[2])
        return per_group.permute(2, 0, 1, 3)

    def output_gradients(self, module: nn.Module, grad: Tensor, num_examples: int) -> Tensor:
        """Return output gradients ``(G, B, R, D_out)``."""
        assert isinstance(module, _Conv)
        pixels = _batched(module, grad).flatten(2).transpose(1, 2)
        per_group = pixels.reshape(num_examples, -1, module.groups, module.out_channels // module.groups)
        return per_group.permute(2, 0, 1, 3)


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
