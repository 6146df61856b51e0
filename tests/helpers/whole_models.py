"""Models at the optimum of a training loss that is not zero, and true losses over all of their examples."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F


class Fitted(LightningModule):
    """A small network in float64 with its training data, trained to the optimum."""

    def __init__(self, net: nn.Sequential, loss: Any, x: Tensor, y: Tensor, decay: float = 1e-4) -> None:
        super().__init__()
        self.net, self.loss, self.x, self.y = net.double(), loss, x, y
        self.fit(x, y, decay)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        found: Tensor = self.loss(self.net(x), y)
        return found

    def fit(self, x: Tensor, y: Tensor, decay: float) -> None:
        optimizer = torch.optim.LBFGS(
            self.net.parameters(),
            max_iter=300,
            tolerance_grad=1e-12,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            squares = sum((p**2).sum() for p in self.net.parameters())
            value = self.loss(self.net(x), y) + decay / 2 * squares
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    @property
    def data(self) -> torch.utils.data.DataLoader[Any]:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(self.x, self.y), 64, shuffle=True)

    def total(self, y: Tensor, which: slice = slice(None)) -> float:
        with torch.no_grad():
            return float(self.loss(self.net(self.x[which]), y[which]))

    def vector(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()])


def regression(seed: int, count: int = 1000) -> tuple[Fitted, Tensor, Tensor]:
    """Noisy regression; the first twentieth gets targets that are higher by one."""
    generator = torch.Generator().manual_seed(seed)
    x, w, noise = (torch.randn(*s, generator=generator).double() for s in ((count, 8), (8, 1), (count, 1)))
    y = torch.sin(x @ w) + 0.3 * noise
    torch.manual_seed(seed)
    model = Fitted(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), F.mse_loss, x, y)
    examples, new = torch.arange(count // 20), y.clone()
    new[examples] += 1
    return model, examples, new


def noisy_classes(seed: int, count: int = 1500) -> tuple[Fitted, Tensor, Tensor]:
    """Three classes with label noise; the first 2% get the next label."""
    generator = torch.Generator().manual_seed(seed)
    x, w, noise = (torch.randn(*s, generator=generator).double() for s in ((count, 8), (8, 3), (count, 3)))
    y = (x @ w + noise).argmax(1)
    torch.manual_seed(seed)
    model = Fitted(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), F.cross_entropy, x, y)
    examples, new = torch.arange(count // 50), y.clone()
    new[examples] = (y[examples] + 1) % 3
    return model, examples, new


def line(count: int = 60, outputs: int = 1, features: int = 5) -> Fitted:
    """Linear regression at its optimum."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((count, features), (features, outputs), (count, outputs))
    x, w, noise = (torch.randn(*shape, generator=generator).double() for shape in shapes)
    return Fitted(nn.Sequential(nn.Linear(features, outputs)), F.mse_loss, x, x @ w + 0.3 * noise, 0.0)


def retrained(model: Fitted, x: Tensor, y: Tensor) -> Tensor:
    """The parameters of linear regression on other data, in the order of `Fitted.vector`."""
    rows = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    solution = torch.linalg.lstsq(rows, y).solution.T
    return torch.cat([solution[:, :-1].reshape(-1), solution[:, -1]])
