"""Per-example gradients by automatic differentiation, one example at a time, and small models to try."""

import torch
from torch import nn


def reference_gradients(model, batch, loss_of):
    """``(B, *shape)`` by parameter, from one backward pass for each example; zeros for what takes no part."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = loss_of(model, batch)
    rows = [
        torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    return {
        name: torch.stack([torch.zeros_like(p) if row[at] is None else row[at] for row in rows])
        for at, (name, p) in enumerate(parameters.items())
    }


def squared_loss(model, batch):
    """A loss of each example that is not linear in the outputs, whatever their shape."""
    x, y = batch
    out = model(x)
    target = torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype).view(out.shape[1:])
    return ((out - target - y.view(-1, *[1] * (out.ndim - 1))) ** 2).flatten(1).sum(1)


class Formula(nn.Module):
    """A model that is a function of its parameters: ``formula(p, x)`` with ``p.name``."""

    def __init__(self, formula, **shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(values / max(1, values.numel()) ** 0.25))
        self.formula = formula

    def forward(self, x):
        return self.formula(self, x)


def numbers(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape, high=11, seed=4):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))
