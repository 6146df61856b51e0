"""Random draws: labels from the model's own distributions, noise, signs, mixtures of columns.

Sources of randomness are generators. A :class:`ExampleGenerator` gives each example the draws that belong to
its dataset index, whatever batch it is in and whatever process sees it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_influence.support.random_states import combine_keys, hash_numbers

# Purposes of draws that have to be independent of each other.
COVARIANCES, SQUARES = 0, 1


class ExampleGenerator(torch.Generator):
    """A source of draws that follow dataset indices; each draw from it is another one.

    What draws from it has one row an example, or several rows in a run, as the outputs of a batch have. Rows
    that are no multiple of the examples are drawn from the generator that it is as well.

    Args:
        seed: of the whole pass.
        indices: dataset indices of the batch's examples, ``(B,)``.
        purpose: :data:`COVARIANCES` or :data:`SQUARES`: independent draws for the two.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the generator, on the CPU."""
        return super().__new__(cls)

    def __init__(self, seed: int, indices: Tensor, purpose: int = COVARIANCES) -> None:
        super().__init__()
        keys = combine_keys(combine_keys(indices.new_tensor([seed]), purpose), 0)
        self._keys = hash_numbers(keys ^ indices, 1)[:, 0]
        self._draws = 0
        first = int(self._keys[0]) if len(indices) else seed
        self.manual_seed(first % 2**63)

    def next_keys(self, device: torch.device) -> Tensor:
        """Return a key of each example for one draw, ``(B,)``."""
        self._draws += 1
        return combine_keys(self._keys.to(device, non_blocking=True), self._draws)

    def count_each(self, shape: torch.Size) -> int | None:
        """Return how many numbers of a draw are each example's; None if they cannot be told apart."""
        examples = len(self._keys)
        return shape.numel() // examples if shape and examples and shape[0] % examples == 0 else None


def draw_uniform(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw numbers between 0 (included) and 1.

    Args:
        like: gives their shape, dtype and device.
        generator: source of the randomness; its device may differ from that of ``like``.

    Returns:
        Independent draws in the shape of ``like``.
    """
    if isinstance(generator, ExampleGenerator):
        count = generator.count_each(like.shape)
        if count is not None:
            bits = 53 if like.dtype == torch.float64 else 24  # as many as the precision holds
            numbers = hash_numbers(generator.next_keys(like.device), count) >> (64 - bits)
            result: Tensor = (numbers & (2**bits - 1)).to(like.dtype) * 2.0**-bits
            return result.view(like.shape)
    device = generator.device if generator is not None else like.device
    return torch.rand(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def draw_labels(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one label from each distribution, by inverting its cumulative sum.

    Args:
        probabilities: shape ``(..., C)``; classes of probability 0 are never drawn.
        generator: source of the randomness; its device may differ from that of the probabilities.

    Returns:
        Labels, shape ``(...)``.
    """
    cumulative = probabilities.cumsum(-1).contiguous()
    uniform = draw_uniform(cumulative[..., -1:], generator)
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
    return (draw_uniform(probabilities, generator) < probabilities).to(probabilities.dtype)


def draw_normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal numbers.

    Args:
        like: gives their shape, dtype and device.
        generator: source of the randomness; its device may differ from that of ``like``.

    Returns:
        Independent draws in the shape of ``like``.
    """
    if isinstance(generator, ExampleGenerator):  # the pairs of Box and Muller (1958), of which one is used
        radius = (-2 * (1 - draw_uniform(like, generator)).log()).sqrt()
        return radius * (2 * math.pi * draw_uniform(like, generator)).cos()
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
    if isinstance(generator, ExampleGenerator):
        count = generator.count_each(like.shape)
        if count is not None:  # 64 signs of a number
            numbers = hash_numbers(generator.next_keys(like.device), -(-count // 64))
            octets = numbers.contiguous().view(torch.uint8).int()
            return _look_up_signs(octets, like).flatten(1)[:, :count].reshape(like.shape)
    device = generator.device if generator is not None else like.device
    numbers = torch.randint(0, 256, (-(-like.numel() // 8),), generator=generator, device=device)
    return _look_up_signs(numbers.to(like.device), like).flatten()[: like.numel()].reshape(like.shape)


def _look_up_signs(octets: Tensor, like: Tensor) -> Tensor:
    """Return the eight signs of each number below 256, ``(..., 8)``: one by itself costs as much as eight."""
    bits = (torch.arange(256, device=like.device)[:, None] >> torch.arange(8, device=like.device)) & 1
    return torch.nn.functional.embedding(octets, (2 * bits - 1).to(like.dtype))


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
