"""What a large vocabulary costs: a small GPT-2 whose head is its embedding, against plain epochs.

    OMP_NUM_THREADS=1 python examples/benchmarks/tables.py [vocabulary ...] [--method ekfac] [--untied]

Each vocabulary is measured in a process of its own: processor time of a plain epoch (forward and backward
passes over the training sequences, no optimizer), of factors, and of the scores of the queries, and the most
resident memory above that of the model and its data. Weights and tokens are random.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule
from memory import Peak
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule

VOCABULARIES = [10_000, 50_000]
_SIZES = {"width": 128, "length": 64, "depth": 2, "batch": 16, "queries": 8, "sequences": 128}
_RESULT = "RESULT "


class Model(LightningModule):
    """Embeddings and positions, transformer blocks, and a head, which is the embedding unless untied."""

    def __init__(self, vocabulary: int, width: int, length: int, depth: int, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) / 50)
        block = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks, self.norm = nn.TransformerEncoder(block, depth), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        if tied:
            self.head.weight = self.embedding.weight

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        """Return the mean loss of the next tokens."""
        tokens = batch[0]
        x = self.embedding(tokens[:, :-1]) + self.positions[: tokens.shape[1] - 1]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        outputs = self.head(self.norm(self.blocks(x, mask=mask, is_causal=True)))
        return functional.cross_entropy(outputs.flatten(0, 1), tokens[:, 1:].flatten())


def make_loader(count: int, length: int, vocabulary: int, batch_size: int, seed: int) -> DataLoader[Any]:
    """Return random sequences whose tokens are as frequent as words are: the n-th about 1 / n."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1.0 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    tokens = torch.multinomial(frequencies, count * (length + 1), replacement=True, generator=generator)
    return DataLoader(TensorDataset(tokens.view(count, length + 1)), batch_size=batch_size)


def run_epoch(model: Model, loader: DataLoader[Any]) -> None:
    """Run forward and backward passes over a loader."""
    for batch in loader:
        model.training_step(batch).backward()
        model.zero_grad()


def measure(vocabulary: int, options: argparse.Namespace) -> dict[str, float]:
    """Return seconds and mebibytes of one vocabulary."""
    model = Model(vocabulary, options.width, options.length, options.depth, tied=not options.untied)
    train = make_loader(options.sequences, options.length, vocabulary, options.batch, 1)
    queries = make_loader(options.queries, options.length, vocabulary, options.batch, 2)
    first = [next(iter(train))]
    run_epoch(model, first)  # type: ignore[arg-type]
    found = {"parameters": float(sum(p.numel() for p in model.parameters()))}
    with Peak() as peak:
        start = time.process_time()
        run_epoch(model, train)
        found["epoch"] = time.process_time() - start
    found["epoch_peak"] = peak.highest - peak.base
    module = InfluenceModule(model)
    with Peak() as peak:
        start = time.process_time()
        module.prepare(train, method=options.method)
        found["factors"] = time.process_time() - start
    found["factors_peak"] = peak.highest - peak.base
    with Peak() as peak:
        start = time.process_time()
        module.scores(train, queries, method=options.method)
        found["scores"] = time.process_time() - start
    found["scores_peak"] = peak.highest - peak.base
    return found


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("vocabularies", nargs="*", type=int, default=VOCABULARIES)
    parser.add_argument("--method", default="ekfac")
    for name, default in _SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure in processes of their own, and print a table."""
    options = read_options(arguments)
    if options.one:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        print(_RESULT + json.dumps(measure(options.vocabularies[0], options)), flush=True)
        return
    columns = ("tokens", "parameters", "epoch, s", "MiB", "factors, epochs", "MiB", "scores, epochs", "MiB")
    table = Table(*columns, title=f"{options.method}, {options.sequences} sequences of {options.length}")
    given = ["--method", options.method, *(["--untied"] if options.untied else [])]
    for name in _SIZES:
        given += [f"--{name}", str(getattr(options, name))]
    for vocabulary in options.vocabularies:
        command = [sys.executable, __file__, str(vocabulary), *given, "--one"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(told[told.index(_RESULT) + len(_RESULT) :])
        table.add_row(
            f"{vocabulary:,}",
            f"{found['parameters']:,.0f}",
            f"{found['epoch']:.1f}",
            f"{found['epoch_peak']:.0f}",
            f"{found['factors'] / found['epoch']:.1f}",
            f"{found['factors_peak']:.0f}",
            f"{found['scores'] / found['epoch']:.1f}",
            f"{found['scores_peak']:.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
