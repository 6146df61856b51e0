"""The networks of the benchmark tasks; their source is part of the cache's key, an edit retrains them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 128
CONTEXT = 64


def small_mlp_net() -> nn.Module:
    """64-64-32-10 with GELU: 6,570 parameters."""
    widths = (nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    return nn.Sequential(*widths)


def narrow_mlp_net() -> nn.Module:
    """64-32-10 with GELU: 2,410 parameters."""
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def diabetes_net() -> nn.Module:
    """10-24-1 with GELU: 289 parameters."""
    return nn.Sequential(nn.Linear(10, 24), nn.GELU(), nn.Linear(24, 1))


def cancer_net() -> nn.Module:
    """30-16-1 with GELU: 513 parameters."""
    return nn.Sequential(nn.Linear(30, 16), nn.GELU(), nn.Linear(16, 1))


def blobs_net() -> nn.Module:
    """20-32-16-4 with GELU: 1,268 parameters."""
    return nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))


def cnn_net() -> nn.Module:
    """Two convolutions and two linear layers on 8 x 8 images, smooth throughout: 38,282 parameters."""
    first = (nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.AvgPool2d(2))
    second = (nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 10))


def large_mlp_net() -> nn.Module:
    """784-1024-1024-10 with ReLU: 1,863,690 parameters."""
    first = (nn.Linear(784, 1024), nn.ReLU())
    return nn.Sequential(*first, nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


class Block(nn.Module):
    """Pre-norm transformer block with causal attention, every map an ``nn.Linear``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(B, T, width)``."""
        normed = self.norm1(x)
        q, k, v = (
            m(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        outputs: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return outputs


class CharacterTransformer(nn.Module):
    """Characters ``(B, T)`` to logits ``(B, T, VOCABULARY)``; embeddings and norms are not attributed."""

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the logits of each next character."""
        x = self.token(characters) + self.place.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


LETTERS = 27
PASSAGE = 16


class SmallBlock(nn.Module):
    """Pre-norm block with causal attention written out, so that many models can be trained at once."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        mask = torch.full((PASSAGE, PASSAGE), float("-inf")).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(B, T, width)``."""
        normed = self.norm1(x)
        q, k, v = (
            m(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + self.mask).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        outputs: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return outputs


class SmallTransformer(nn.Module):
    """Letters ``(B, T)`` to logits ``(B, T, LETTERS)``: 5,451 parameters in its attributed linear layers."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(LETTERS, width), nn.Embedding(PASSAGE, width)
        self.block = SmallBlock(width, heads)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        """Return the logits of each next letter."""
        logits: Tensor = self.head(self.norm(self.block(self.token(letters) + self.place.weight)))
        return logits
