"""Models of the size people train, and made-up data that they can learn: ResNets, GPTs, ViTs, Llamas."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.model.layers.plan import find_layers

CLASSES = 10
# Tokens come in clusters, so that sequences can be learned from few of them.
_CLUSTERS, _FOLLOWERS = 50, 3


@dataclass(frozen=True)
class Size:
    """Width and depth of a model, of its data, and how much it is asked about.

    Attributes:
        kind: ``"resnet"``, ``"resnet18"``, ``"gpt"``, ``"vit"`` or ``"llama"``.
        width: of the first stage, or of the stream of a transformer.
        depth: blocks of a stage, or of a transformer.
        examples: training examples.
        queries: how many.
        extent: pixels of a side, or tokens of a sequence.
        detail: pixels of a patch's side, or words of the vocabulary.
        batch: examples of a batch.
    """

    kind: str
    width: int
    depth: int
    examples: int
    queries: int
    extent: int = 16
    detail: int = 4
    batch: int = 32


SIZES = {
    "resnet": Size("resnet", 40, 2, 384, 8),
    "gpt": Size("gpt", 192, 4, 256, 8, 16, 1000),
    "vit": Size("vit", 160, 4, 384, 8),
    "resnet18": Size("resnet18", 64, 2, 2000, 50, 32),
    "gpt10m": Size("gpt", 320, 6, 256, 8, 64, 5000, 8),
    "vit5m": Size("vit", 256, 6, 1000, 50, 32, 8),
    "llama64": Size("llama", 64, 2, 256, 50, 48, 1000),
    "llama128": Size("llama", 128, 4, 256, 50, 48, 1000),
    "llama128_2000": Size("llama", 128, 4, 256, 50, 48, 2000),
}


class Residual(nn.Module):
    """Two convolutions with normalisation, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, outputs, H, W)``."""
        return functional.relu(self.body(x) + self.shortcut(x))


def make_resnet(size: Size) -> nn.Module:
    """Stages of residual blocks: three for small images, or the four and the stem of a ResNet-18."""
    width, deep = size.width, size.kind == "resnet18"
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False) if deep else nn.Conv2d(3, width, 3, 1, 1, bias=False)
    stages: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()]
    if deep:
        stages.append(nn.MaxPool2d(3, 2, 1))
    inputs = width
    for stage in range(4 if deep else 3):
        outputs = width * 2**stage
        for number in range(size.depth):
            stages.append(Residual(inputs, outputs, 2 if stage and not number else 1))
            inputs = outputs
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.heads = causal, 4
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, T, width)``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        outputs: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return outputs


class Gpt(nn.Module):
    """Tokens ``(B, T)`` to logits of the next ones ``(B, T, V)``, with learned places and norms."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token = nn.Embedding(size.detail, size.width)
        self.place = nn.Embedding(size.extent, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, causal=True) for _ in range(size.depth)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.detail, bias=False)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.02 if size.detail > 1000 else 1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        places = self.place(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.token(tokens) + places)))
        return logits


class Vit(nn.Module):
    """Images to logits, through patches."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size.width, size.detail, size.detail)
        self.place = nn.Parameter(torch.randn(1, (size.extent // size.detail) ** 2, size.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(size.width, causal=False) for _ in range(size.depth)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.place)
        logits: Tensor = self.head(self.norm(hidden).mean(dim=1))
        return logits


def make_llama(size: Size) -> nn.Module:
    """A Llama of transformers as it is, with random weights."""
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=size.detail, hidden_size=size.width, intermediate_size=2 * size.width,
        num_hidden_layers=size.depth, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=size.extent, pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


MODELS: dict[str, Callable[[Size], nn.Module]] = {
    "resnet": make_resnet,
    "resnet18": make_resnet,
    "gpt": Gpt,
    "vit": Vit,
    "llama": make_llama,
}


class Module(LightningModule):
    """A classifier, of images or of next tokens."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the loss."""
        outputs = self.net(batch[0])
        return functional.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


class Published(Module):
    """A language model that computes its loss itself."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the model's own loss of the next tokens."""
        loss: Tensor = self.net(input_ids=batch[0], labels=batch[0]).loss
        return loss


def draw_images(size: Size, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy images of one smooth pattern a class; a tenth of the labels are wrong."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    clean = functional.interpolate(patterns, size=(size.extent, size.extent), mode="bilinear")[labels]
    noisy = clean + (0.9 * size.extent / 16) * torch.randn(clean.shape, generator=generator)
    wrong = torch.rand(count, generator=generator) < 0.1
    return noisy, torch.where(wrong, torch.randint(CLASSES, (count,), generator=generator), labels)


def draw_tokens(size: Size, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sequences of a chain of clusters, each with some common words and few that follow."""
    fixed = torch.Generator().manual_seed(7)
    followers = torch.randint(_CLUSTERS, (_CLUSTERS, _FOLLOWERS), generator=fixed)
    words = size.detail // _CLUSTERS
    common = 1 / torch.arange(1, words + 1, dtype=torch.float64)
    cluster, tokens = torch.randint(_CLUSTERS, (count,), generator=generator), []
    for _ in range(size.extent + 1):
        word = torch.multinomial(common, count, replacement=True, generator=generator)
        tokens.append(cluster * words + word)
        cluster = followers[cluster, torch.randint(_FOLLOWERS, (count,), generator=generator)]
    sequence = torch.stack(tokens, dim=1)
    return sequence[:, :-1], sequence[:, 1:]


def train(
    size: Size, epochs: int, count: int | None = None
) -> tuple[Module, list[DataLoader[Any]], TrainingRecord]:
    """Train a model on made-up data.

    Args:
        size: of the model and of what is asked.
        epochs: of training.
        count: training examples, of which the first ``size.examples`` are asked about; these alone if None.

    Returns:
        The model, the loaders of examples and queries, and the run's record.
    """
    torch.manual_seed(0)
    draw = draw_tokens if size.kind in ("gpt", "llama") else draw_images
    generator = torch.Generator().manual_seed(1)
    counts = max(count or 0, size.examples), size.queries
    tables: list[Any] = [TensorDataset(*draw(size, number, generator)) for number in counts]
    module = (Published if size.kind == "llama" else Module)(MODELS[size.kind](size))
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    layers, record = find_layers(module).layers, TrainingRecord()
    for _ in range(epochs):
        for batch in DataLoader(tables[0], size.batch, shuffle=True):
            optimizer.zero_grad()
            module.training_step(batch).backward()
            record.add_step(optimizer, layers)
            optimizer.step()
    record.read_metric(optimizer, layers)
    module.zero_grad()
    tables[0] = Subset(tables[0], range(size.examples))
    return module.eval(), [DataLoader(table, size.batch) for table in tables], record
