"""Larger networks of the benchmarks: residual networks on small images, and a language model."""

from __future__ import annotations

from nets import Block
from torch import Tensor, nn


class Residual(nn.Module):
    """A residual unit: two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1 (He et al. 2016)."""

    def __init__(self, before: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        after = 4 * width if bottleneck else width
        kernels = [(before, width, 1, 1), (width, width, 3, stride), (width, after, 1, 1)]
        if not bottleneck:
            kernels = [(before, width, 3, stride), (width, width, 3, 1)]
        parts: list[nn.Module] = []
        for d_in, d_out, size, step in kernels:
            convolution = nn.Conv2d(d_in, d_out, size, step, size // 2, bias=False)
            parts += [convolution, nn.BatchNorm2d(d_out), nn.ReLU()]
        self.branch = nn.Sequential(*parts[:-1])
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit's output."""
        return nn.functional.relu(self.branch(x) + self.skip(x))


def make_resnet(depths: tuple[int, ...], width: int, *, bottleneck: bool) -> nn.Module:
    """Return a ResNet for small images: its first convolution is 3 x 3, without pooling."""
    parts: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    before = width
    for stage, depth in enumerate(depths):
        for unit in range(depth):
            stride = 2 if stage and not unit else 1
            parts.append(Residual(before, width * 2**stage, stride, bottleneck=bottleneck))
            before = width * 2**stage * (4 if bottleneck else 1)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class LanguageModel(nn.Module):
    """Tokens ``(B, T)`` to logits ``(B, T, V)``: pre-norm blocks between an embedding and a head."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each next token."""
        x = self.token(tokens) + self.place.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def resnet10_net() -> nn.Module:
    """Four stages of one residual unit each, on 32 x 32 images that the stem halves: 1,228,970 parameters."""
    net = make_resnet((1, 1, 1, 1), 32, bottleneck=False)
    assert isinstance(net, nn.Sequential)
    net[0] = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
    return net


def resnet18_net() -> nn.Module:
    """ResNet-18 with the stem of its authors (He et al. 2016), for 10 classes: 11,181,642 parameters."""
    net = make_resnet((2, 2, 2, 2), 64, bottleneck=False)
    assert isinstance(net, nn.Sequential)
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(stem, net[1], net[2], nn.MaxPool2d(3, stride=2, padding=1), *net[3:])


def small_language_net() -> nn.Module:
    """2,000 tokens, 32 places, width 128, 4 blocks: 1.3 million parameters."""
    return LanguageModel(2000, 32, 128, 4, 4)


def language_net() -> nn.Module:
    """5,000 tokens, 32 places, width 320, 6 blocks: 10.6 million parameters."""
    return LanguageModel(5000, 32, 320, 8, 6)
