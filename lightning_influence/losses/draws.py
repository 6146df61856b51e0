"""Random draws: labels from the model's own distributions, noise, and signs.

The generator may live on another device than the probabilities: a CPU generator gives the same draws
everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_labels(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one label from each distribution, by inverting its cumulative sum.

    Args:
        probabilities: shape ``(..., C)``; classes of probability 0 are never drawn.
        generator: source of the randomness; its device may differ from that of the probabilities.

    Returns:
        Labels, shape ``(...)``.
    """
    cumulative = probabilities.cumsum(-1).contiguous()
    device = generator.device if generator is not None else cumulative.device
    uniform = torch.rand(
        (*cumulative.shape[:-1], 1), dtype=cumulative.dtype, device=device, generator=generator
    ).to(cumulative.device)
    labels = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True).squeeze(-1)
    return labels.clamp_(max=probabilities.shape[-1] - 1)


def draw_bits(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw 0 or 1 from each Bernoulli distribution.

    Args:
        probabilities: of a 1, any shape.
        generator: source of the randomness; its device may differ from that of the probabilities.

    Returns:
        Zeros and ones in the shape, dtype and device of the probabilities.
    """
    device = generator.device if generator is not None else probabilities.device
    uniform = torch.rand(probabilities.shape, dtype=probabilities.dtype, device=device, generator=generator)
    return (uniform.to(probabilities.device) < probabilities).to(probabilities.dtype)


def draw_normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal numbers.

    Args:
        like: gives their shape, dtype and device.
        generator: source of the randomness; its device may differ from that of ``like``.

    Returns:
        Independent draws in the shape of ``like``.
    """
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def draw_signs(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw 1 or -1 with equal probability.

    Args:
        like: gives their shape, dtype and device.
        generator: source of the randomness; its device may differ from that of ``like``.

    Returns:
        Independent signs in the shape, dtype and device of ``like``.
    """
    device = generator.device if generator is not None else like.device
    bits = torch.randint(0, 2, like.shape, generator=generator, device=device, dtype=torch.int8)
    return (2 * bits - 1).to(like.device, like.dtype)
