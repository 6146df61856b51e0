"""What ``auto`` is worth where parameters are many and memory is short: a ResNet, a GPT and a ViT.

    OMP_NUM_THREADS=1 python examples/benchmarks/large_auto.py [resnet gpt vit] [--budgets MIB ...]

Each model is trained briefly on made-up data that can be learned, and asked about with ``method="ekfac"`` and
with ``method="auto"`` under stated memory budgets. Quality is the relative residual, which ``auto`` reports,
and the rank correlation of scores, mean over the queries, with those of a converged ``method="cg"``. Cost is
CPU time over that of a plain epoch, forward and backward over the same training examples: factors apart, and
the answer with everything else. Sizes are options; ``--tiny`` takes seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributions, InfluenceModule

# Chosen by hand: a rank correlation with scores of this residual is not limited by them.
CONVERGED = 1e-2


@dataclass(frozen=True)
class Size:
    """Width and depth of a model, and how many training examples and queries it is asked about."""

    width: int
    depth: int
    examples: int
    queries: int


SIZES = {
    "resnet": Size(width=40, depth=2, examples=384, queries=8),
    "gpt": Size(width=192, depth=4, examples=256, queries=8),
    "vit": Size(width=160, depth=4, examples=384, queries=8),
}
TINY = {name: Size(width=8, depth=1, examples=24, queries=3) for name in SIZES}
VOCABULARY, CONTEXT, CLASSES, PIXELS = 1000, 16, 10, 16


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
    """Three stages of residual blocks on small colour images."""
    width, layers = size.width, [nn.Conv2d(3, size.width, 3, 1, 1, bias=False), nn.BatchNorm2d(size.width)]
    stages: list[nn.Module] = [*layers, nn.ReLU()]
    inputs = width
    for stage in range(3):
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
    """Tokens ``(B, T)`` to logits of the next ones ``(B, T, VOCABULARY)``, with learned places and norms."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, size.width), nn.Embedding(CONTEXT, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, causal=True) for _ in range(size.depth)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        places = self.place(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.token(tokens) + places)))
        return logits


class Vit(nn.Module):
    """Images to logits, through patches of 4 x 4 pixels."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size.width, 4, 4)
        self.place = nn.Parameter(torch.randn(1, (PIXELS // 4) ** 2, size.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(size.width, causal=False) for _ in range(size.depth)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.place)
        logits: Tensor = self.head(self.norm(hidden).mean(dim=1))
        return logits


MODELS: dict[str, Callable[[Size], nn.Module]] = {"resnet": make_resnet, "gpt": Gpt, "vit": Vit}


class Module(LightningModule):
    """A classifier, of images or of next tokens."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the loss."""
        outputs = self.net(batch[0])
        return functional.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def draw_images(count: int, generator: torch.Generator, pixels: int = PIXELS) -> tuple[Tensor, Tensor]:
    """Return noisy images of one smooth pattern a class; a tenth of the labels are wrong."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    clean = functional.interpolate(patterns, size=(pixels, pixels), mode="bilinear")[labels]
    noisy = clean + 0.9 * torch.randn(clean.shape, generator=generator)
    wrong = torch.rand(count, generator=generator) < 0.1
    return noisy, torch.where(wrong, torch.randint(CLASSES, (count,), generator=generator), labels)


def draw_tokens(
    count: int, generator: torch.Generator, vocabulary: int = VOCABULARY, context: int = CONTEXT
) -> tuple[Tensor, Tensor]:
    """Return sequences of a chain in which each token has few likely successors."""
    successors = torch.randint(vocabulary, (vocabulary, 3), generator=torch.Generator().manual_seed(7))
    tokens = [torch.randint(vocabulary, (count,), generator=generator)]
    for _ in range(context):
        chosen = torch.randint(3, (count,), generator=generator)
        tokens.append(successors[tokens[-1], chosen])
    sequence = torch.stack(tokens, dim=1)
    return sequence[:, :-1], sequence[:, 1:]


def train(name: str, size: Size, epochs: int) -> tuple[Module, list[DataLoader[Any]]]:
    """Return a model trained on made-up data, and the loaders of training examples and queries."""
    torch.manual_seed(0)
    draw = draw_tokens if name == "gpt" else draw_images
    generator = torch.Generator().manual_seed(1)
    tables = [TensorDataset(*draw(count, generator)) for count in (size.examples, size.queries)]
    module = Module(MODELS[name](size))
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in DataLoader(tables[0], 32, shuffle=True):
            optimizer.zero_grad()
            module.training_step(batch).backward()
            optimizer.step()
    return module, [DataLoader(table, 32) for table in tables]


def time_epoch(module: Module, loader: DataLoader[Any]) -> float:
    """Return CPU seconds of forward and backward passes over all training examples, the better of two."""
    seconds = []
    for _ in range(2):
        started = time.process_time()
        for batch in loader:
            module.training_step(batch).backward()
        seconds.append(time.process_time() - started)
        module.zero_grad()
    return min(seconds)


@dataclass(frozen=True)
class Row:
    """One way of asking: what it cost in plain epochs, and how good it is."""

    model: str
    method: str
    budget_mib: float | None
    directions: int | None
    rank: int | None
    residual: float | None
    largest_residual: float | None
    correlation: float
    passes: int
    epochs: float


def correlate(one: Tensor, other: Tensor) -> float:
    """Return the mean rank correlation of the queries' scores."""
    pairs = zip(one.double(), other.double(), strict=True)
    return float(sum(spearmanr(a, b).statistic for a, b in pairs) / len(one))


def study(name: str, size: Size, budgets: Sequence[float], epochs: int, damping: float) -> list[Row]:
    """Ask one model in every way.

    Args:
        name: of the model.
        size: of the model and the data.
        budgets: memory budgets of ``auto``, in MiB.
        epochs: of training.
        damping: of all methods.

    Returns:
        The rows.
    """
    module, loaders = train(name, size, epochs)
    module.eval()
    plain = time_epoch(module, loaders[0])
    fitted = InfluenceModule(module)
    started = time.process_time()
    ask_one(fitted, loaders, "ekfac", damping)  # fits the factors that all others use
    fitting = (time.process_time() - started) / plain
    target = ask_one(fitted, loaders, "cg", damping, tolerance=CONVERGED, max_steps=300)
    numel = sum(p.numel() for p in module.parameters())
    residuals = target.diagnostics.residuals
    assert residuals is not None
    told = f"plain epoch {plain:.2f} s, factors and ekfac {fitting:.1f} epochs"
    print(f"{name}: {numel:,} parameters, {told}, residual of cg {float(residuals.max()):.2g}", flush=True)
    rows = []
    for method, budget in [("identity", None), ("ekfac", None), *(("auto", budget) for budget in budgets)]:
        fresh = InfluenceModule(module, state=copy(fitted.state))  # factors, but no coarse space
        options = {} if budget is None else {"memory_budget": int(budget * 2**20)}
        started = time.process_time()
        found = ask_one(fresh, loaders, method, damping, **options)
        cost = (time.process_time() - started) / plain
        extra, told = found.diagnostics.extra, found.diagnostics.residuals
        row = Row(
            model=name,
            method=method,
            budget_mib=budget,
            directions=extra.get("coarse_space"),
            rank=extra.get("coarse_rank"),
            residual=None if told is None else float(told.median()),
            largest_residual=None if told is None else float(told.max()),
            correlation=correlate(found.scores, target.scores),
            passes=len(found.diagnostics.passes),
            epochs=cost,
        )
        print(row, flush=True)
        rows.append(row)
    return rows


def ask_one(
    model: InfluenceModule, loaders: list[DataLoader[Any]], method: str, damping: float, **options: Any
) -> Attributions:
    """Return the scores of all queries, without progress and notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.scores(*loaders, method=method, damping=damping, **options)


def show(rows: Sequence[Row]) -> None:
    """Print a table."""
    names = "model method MiB directions rank residual largest rho passes epochs"
    table = Table(*names.split())
    for row in rows:
        cells = asdict(row).values()
        table.add_row(*("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in cells))
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--budgets", nargs="+", type=float, default=[64.0, 256.0], help="in MiB")
    parser.add_argument("--width", type=int, help="of the model")
    parser.add_argument("--depth", type=int, help="blocks, of a stage for the ResNet")
    parser.add_argument("--examples", type=int, help="training examples")
    parser.add_argument("--queries", type=int)
    parser.add_argument("--epochs", type=int, default=4, help="of training")
    parser.add_argument("--damping", type=float, default=3e-3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for name in given.models:
        size = (TINY if given.tiny else SIZES)[name]
        size = Size(**{key: getattr(given, key) or value for key, value in asdict(size).items()})
        rows += study(name, size, given.budgets, given.epochs, given.damping)
    show(rows)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


if __name__ == "__main__":
    main()
