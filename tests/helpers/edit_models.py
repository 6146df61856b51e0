"""A small trained module in float32, for edits through the public calls."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from influence_models import Net, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.support.errors import InfluenceWarning


def blobs(count: int = 60, seed: int = 0) -> TensorDataset:
    """Three classes, well apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    centres = torch.tensor([[2.0, 0, 0, 1], [0, 2.0, 0, -1], [0, 0, 2.0, 0]])
    return TensorDataset(centres[y] + 0.5 * torch.randn(count, 4, generator=generator), y)


def train(**options: Any) -> DataLoader[Any]:
    return DataLoader(blobs(), **{"batch_size": 16, "shuffle": True, **options})


def of_class(label: int) -> Tensor:
    return (blobs().tensors[1] == label).nonzero().flatten()


def fitted(epochs: int = 12, width: int = 16) -> Net:
    torch.manual_seed(0)
    module = Net(width)
    trainer(max_epochs=epochs).fit(module, train())
    return module


def asked(module: Any = None) -> InfluenceModule:
    return InfluenceModule(fitted() if module is None else module)


def accuracy(module: Any, label: int | None = None, dataset: TensorDataset | None = None) -> float:
    x, y = (blobs() if dataset is None else dataset).tensors
    if label is not None:
        x, y = x[y == label], y[y == label]
    was = module.training
    with torch.no_grad():
        found = (module.eval()(x).argmax(1) == y).float().mean()
    module.train(was)
    return float(found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InfluenceWarning)
        yield
