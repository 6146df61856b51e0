"""Time of Gauss-Newton products: by columns of the output curvature, and through autograd.

Run ``python examples/benchmarks/products.py``. It prints, for each network, number of columns and number of
vectors, the milliseconds of one batch either way, and marks the way that the library chooses.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from lightning import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from lightning_influence.curvature.gauss_newton import CurvatureProductPass
from lightning_influence.model.layers.plan import LayerPlan, find_layers

_ROUTE = "_autograd_is_cheaper"


class Classifier(LightningModule):
    """A network and a cross-entropy over the classes, of each token if there are tokens."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss."""
        logits = self.network(batch[0])
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[1].flatten())


def mlp(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The digits MLP, 64-64-32-classes."""
    hidden = [nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU()]
    return nn.Sequential(*hidden, nn.Linear(32, classes)), torch.randn(64, 64), torch.randint(classes, (64,))


def wide(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A wider MLP, 256-512-256-classes."""
    hidden = [nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.GELU()]
    return (
        nn.Sequential(*hidden, nn.Linear(256, classes)),
        torch.randn(64, 256),
        torch.randint(classes, (64,)),
    )


def cnn(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Two convolutions on 8 x 8 pictures."""
    body = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU()]
    network = nn.Sequential(*body, nn.Flatten(), nn.Linear(256, classes))
    return network, torch.randn(64, 1, 8, 8), torch.randint(classes, (64,))


def tokens(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Four tokens an example."""
    network = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, classes))
    return network, torch.randn(16, 4, 32), torch.randint(classes, (16, 4))


def seconds(plan: LayerPlan, module: Classifier, batch: tuple[Tensor, Tensor], count: int) -> float:
    """Return the shortest of three times of one batch with so many vectors."""
    times = []
    for _ in range(3):
        one_pass = CurvatureProductPass(plan, torch.randn(count, plan.numel), fisher="exact")
        start = time.perf_counter()
        one_pass.step(module, batch, torch.arange(len(batch[0])), 0)
        times.append(time.perf_counter() - start)
    return min(times)


def rows(make: Callable[[int], tuple[nn.Module, Tensor, Tensor]]) -> Iterator[tuple[str, ...]]:
    """One row a number of classes and vectors."""
    for classes in (2, 10, 64, 256):
        network, x, y = make(classes)
        module = Classifier(network).eval()
        plan = find_layers(module)
        for count in (1, 4, 16, 64):
            chooser = CurvatureProductPass(plan, torch.empty(count, plan.numel), fisher="exact")
            chosen = getattr(chooser, _ROUTE)(chooser.forward(module, (x, y), len(x)))
            found = []
            for way in (False, True):
                with mock.patch.object(CurvatureProductPass, _ROUTE, lambda *_, way=way: way):
                    found.append(seconds(plan, module, (x, y), count))
            columns, autograd = (f"{1000 * value:.1f}" for value in found)
            loss = found[chosen] / min(found)
            outputs = str(chooser.columns)
            yield make.__name__, str(plan.numel), outputs, str(count), columns, autograd, f"{loss:.2f}"


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    heads = (
        "network",
        "parameters",
        "columns",
        "vectors",
        "by columns, ms",
        "by autograd, ms",
        "chosen / best",
    )
    table = Table(*heads)
    for make in (mlp, wide, cnn, tokens):
        for row in rows(make):
            table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
