"""Small models of sequences, and what each position adds to their scores, by plain autograd."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

WORDS, WIDTH, LENGTH = 300, 4, 5


class Causal(lightning.LightningModule):
    """A causal language model of one block; its head may be its embedding."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.table(x)
        q, k, v = self.qkv(self.norm(hidden)).chunk(3, dim=-1)
        hidden = hidden + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())


class Words(lightning.LightningModule):
    """Classifies a sequence by the mean of its words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = (
            nn.Embedding(WORDS, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 3),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(
            self.head(torch.tanh(self.mix(self.table(batch[0]))).mean(1)), batch[1]
        )


class Mixture(Words):
    """A language model in which words of some numbers go through a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.mix(self.table(x))
        chosen = (x % 2 == 0) | (x[:, :1] % 2 == 0)  # all words of some examples
        hidden = hidden.masked_scatter(chosen[..., None], self.expert(torch.tanh(hidden[chosen])))
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())


def token_data(count: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (count, LENGTH + 1), generator=generator)
    return TensorDataset(words[:, :-1], words[:, 1:])


def token_loader(count: int, seed: int = 0, batch: int = 3) -> DataLoader[Any]:
    return DataLoader(token_data(count, seed), batch)


def padded(rows: Any) -> tuple[Tensor, ...]:
    """Collate pairs of unlike lengths: no loss of what fills up."""
    most = max(len(x) for x, _ in rows)
    return tuple(
        torch.stack([functional.pad(row[at], (0, most - len(row[at])), value=fill) for row in rows])
        for at, fill in ((0, 0), (1, -100))
    )


def differentiate(model: Any, data: TensorDataset) -> dict[str, Tensor]:
    """Gradients of single losses by parameter name, ``(N, *shape)``."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(model.training_step((x[None], y[None]), 0), parameters) for x, y in data]
    return dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True))


def by_hand(model: Any, data: TensorDataset, solutions: dict[str, Tensor]) -> Tensor:
    """Inner products of solutions with each position's outer products, and with all other gradients.

    Returns:
        ``(T + 1, Q, N)``, the last row of parameters that are in no embedding and linear layer.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    ids = {id(p): name for name, p in model.named_parameters()}
    own = {id(p) for module in modules.values() for p in module.parameters()}
    others = [(ids[id(p)], p) for p in model.parameters() if id(p) not in own]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0][0], out)}))
        for name, module in modules.items()
    ]
    columns = []
    for x, y in data:
        loss = model.training_step((x[None], y[None]), 0)
        names = list(seen)
        outputs = [seen[name][1] for name in names]
        found = torch.autograd.grad(loss, [*outputs, *(p for _, p in others)], allow_unused=True)
        total = torch.zeros(len(x) + 1, len(next(iter(solutions.values()))), dtype=loss.dtype)
        for name, slope in zip(names, found, strict=False):
            module, inputs = modules[name], seen[name][0]
            weight = solutions[ids[id(module.weight)]]
            for t in range(len(x)):
                if isinstance(module, nn.Embedding):
                    total[t] += weight[:, inputs[t]] @ slope[0, t]
                    continue
                product = torch.outer(slope[0, t], inputs[t])
                total[t] += (weight * product).sum((1, 2))
                if module.bias is not None:
                    total[t] += solutions[ids[id(module.bias)]] @ slope[0, t]
        for (name, _), gradient in zip(others, found[len(names) :], strict=True):
            total[-1] += (solutions[name] * gradient).flatten(1).sum(1)
        columns.append(total.detach())
    for handle in handles:
        handle.remove()
    return torch.stack(columns, dim=-1)
