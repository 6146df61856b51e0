"""Random draws: labels from the model's own distributions, noise, signs, mixtures of columns."""

from __future__ import annotations

import torch
from torch import Tensor

# Purposes of draws that have to be independent of each other.
COVARIANCES, SQUARES = 0, 1


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


def balanced_signs(energies: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Random signs in ``count`` groups of about equal energy.

    Args:
        energies: squared norm of each column, ``(B, K)``, not negative.
        count: number of groups ``S``.
        generator: source of the signs; its device may differ from that of the energies.

    Returns:
        Weights of the columns in each seed, ``(S, B, K)``: every column has weight 1 or -1 in one seed and 0
        in the others.

    Raises:
        ValueError: if there is no group.
    """
    if count < 1:
        raise ValueError(f"Got count={count}; accepted are positive numbers of groups.")
    order = energies.argsort(dim=1, descending=True, stable=True)
    # Dealt out there and back, from the largest: 0 1 .. S-1 S-1 .. 1 0 0 1 ..
    place = torch.arange(energies.shape[1], device=energies.device) % (2 * count)
    group = torch.empty_like(order).scatter_(
        1, order, torch.minimum(place, 2 * count - 1 - place).expand_as(order)
    )
    signs = draw_signs(energies, generator)
    return energies.new_zeros(count, *energies.shape).scatter_(0, group[None], signs[None])


def draw_generator(
    seed: int, batch: int, device: torch.device | str = "cpu", purpose: int = COVARIANCES
) -> torch.Generator:
    """Return the source of signs or labels for one batch, which leaves the global random state alone.

    Args:
        seed: of the whole pass or fit.
        batch: number of the batch.
        device: where to draw.
        purpose: :data:`COVARIANCES` or :data:`SQUARES`: independent draws for the two.
    """
    return torch.Generator(device=device).manual_seed((2 * (seed * 1_000_003 + batch) + purpose) % 2**63)
