"""Small modules and Trainers for the tests of the callback."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(lightning.LightningModule):
    """An MLP with dropout; everything a user writes, nothing for influence."""

    def __init__(self, optimizer: str = "sgd", reduction: str = "mean", p: float = 0.3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(p), nn.Linear(8, 3))
        self.kind, self.reduction = optimizer, reduction
        self.batches: list[tuple[torch.Tensor, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return functional.cross_entropy(self.net(x), y, reduction=self.reduction)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "lbfgs": torch.optim.LBFGS}[self.kind](
            self.parameters(), 0.01
        )


def loader(count: int = 40, batch: int = 8, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator).to(dtype)
    y = torch.randint(3, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch, shuffle=True)


def trainer(*callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, lightning.pytorch.callbacks.Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    return lightning.Trainer(callbacks=list(callbacks), **settings)


def fit(
    module: lightning.LightningModule,
    *callbacks: lightning.Callback,
    ckpt_path: str | Path | None = None,
    data: Any = None,
    seed: int = 1,
    **options: Any,
) -> lightning.Trainer:
    """Fit with the same weights, order and dropout for the same seed."""
    host = trainer(*callbacks, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ckpt_path is None and seed:
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
        host.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return host


def tensors(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: t for k, v in items for key, t in tensors(v, f"{prefix}/{k}").items()}


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
