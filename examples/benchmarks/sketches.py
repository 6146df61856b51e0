"""Estimates of the Gauss-Newton matrix of a small language model, against the exact one, at equal cost.

``python examples/benchmarks/sketches.py`` trains a character transformer whose Gauss-Newton matrix can be
formed, and prints for each estimate how far two-level EK-FAC built on it is from exact answers: the cost is
the number of gradients an example. ``--seeds`` repeats the random parts.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable

import torch
from lightning import LightningModule
from nets import Block
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule
from lightning_influence.curvature.coarse_space import CoarseSpace, build_directions, draw_probes
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.two_level import TwoLevel, rescale_inverse
from lightning_influence.linalg.block_krylov import Subspace, block_krylov
from lightning_influence.methods.closed_form import invert_blocks, take_eigenvalues
from lightning_influence.model.forward import Forward
from lightning_influence.model.layers.gradients import DenseGradients
from lightning_influence.model.layers.plan import LayerPlan, Layout, find_layers
from lightning_influence.model.losses.draws import balanced_signs

CLASSES, POSITIONS, WIDTH = 32, 12, 12
TRAIN, QUERIES, ANCHORS = 192, 24, 96

#: Weights ``(S, K)`` of an example's columns, from probabilities, energies, ``S`` and a generator.
Estimate = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]


class Characters(LightningModule):
    """One block of the benchmark transformer on 32 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(CLASSES, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.block, self.norm = Block(WIDTH, 2), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each next character, ``(B, T, C)``."""
        logits: Tensor = self.head(self.norm(self.block(self.token(x) + self.place.weight)))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())


def data() -> tuple[Tensor, Tensor]:
    """Passages of argparse's source, letters and a few signs: training and query rows ``(., T + 1)``."""
    signs = "abcdefghijklmnopqrstuvwxyz _.()"
    text = inspect.getsource(argparse).lower()
    codes = torch.tensor([signs.index(c) if c in signs else CLASSES - 1 for c in text])
    rows = codes[: len(codes) // (POSITIONS + 1) * (POSITIONS + 1)].view(-1, POSITIONS + 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[:TRAIN], rows[TRAIN : TRAIN + QUERIES]


def train(rows: Tensor, steps: int = 1500) -> Characters:
    """Return the model trained until it is sure of many characters, as language models are."""
    torch.manual_seed(0)
    module = Characters()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (32,))]
        optimizer.zero_grad()
        loss = module.training_step([batch[:, :-1], batch[:, 1:]], 0)
        torch.autograd.backward(loss)
        optimizer.step()
    return module.eval()


def label_draws(p: Tensor, energies: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """One label a position, drawn from the model: its column over the root of its probability."""
    labels = torch.multinomial(p, count, replacement=True, generator=generator).T  # (S, T)
    weights = torch.zeros(count, *p.shape)
    weights.scatter_(2, labels[..., None], 1 / p.gather(1, labels.T).T[..., None].sqrt())
    return weights.flatten(1) / count**0.5


def random_signs(p: Tensor, energies: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """All columns with random signs, independently each time."""
    return torch.randint(0, 2, (count, p.numel()), generator=generator).mul(2).sub(1) / count**0.5


def groups(p: Tensor, energies: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Each column in one of ``count`` groups, which have about equal energy, with a random sign."""
    return balanced_signs(energies[None], count, generator)[:, 0]


ESTIMATES: dict[str, Estimate] = {
    "label draws": label_draws,
    "random signs": random_signs,
    "balanced groups": groups,
}


class Problem:
    """The model with all its curvature columns, and what answers are compared with.

    Args:
        damping: lambda.
    """

    def __init__(self, damping: float) -> None:
        rows, queries = data()
        self.module = train(rows)
        self.plan: LayerPlan = find_layers(self.module)
        self.layout = Layout.of(self.plan.layers)
        loader: DataLoader[tuple[Tensor, ...]] = DataLoader(
            TensorDataset(rows[:, :-1], rows[:, 1:]), 32, shuffle=False
        )
        shell = InfluenceModule(self.module)
        shell.fit_factors(loader, fisher="exact")
        factors = shell.state.factors
        assert factors is not None
        self.module.eval()
        flat = dict.fromkeys(self.plan.layers, damping)
        self.damping = damping
        self.inverse: BlockInverse = invert_blocks(self.layout, factors, flat, take_eigenvalues)
        self.p, self.energies, self.columns, self.train = self._examples(rows)
        self.queries = self._examples(queries)[3]
        flat_columns = self.columns.flatten(0, 1)
        self.G = flat_columns.T @ flat_columns / (len(rows) * POSITIONS)
        system = (self.G + damping * torch.eye(len(self.G))).double()
        self.exact = torch.linalg.solve(system, self.queries.double().T).T.float()

    def _examples(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``p``, energies, columns ``(n, K, P)`` and loss gradients ``(n, P)``."""
        found: list[tuple[Tensor, ...]] = []
        for row in rows.split(32):
            captured = Forward(self.plan)(self.module, [row[:, :-1], row[:, 1:]], len(row))
            assert captured.loss is not None
            p = captured.loss.outputs.detach().softmax(1).view(len(row), POSITIONS, CLASSES)
            columns = self.layout.dense(captured.curvature_gradients("exact")).transpose(0, 1)
            gradients = self.layout.dense(captured.loss_gradients())[0] / POSITIONS
            found.append((p, captured.loss.column_energies(), columns, gradients))
        p, energies, columns, gradients = (torch.cat(parts) for parts in zip(*found, strict=True))
        return p, energies, columns, gradients

    def estimate(self, make: Estimate, count: int, seed: int) -> Tensor:
        """Return ``G`` from ``count`` mixtures of each example's columns."""
        generator = torch.Generator().manual_seed(seed)
        examples = zip(self.p, self.energies, self.columns, strict=True)
        mixed = torch.cat([make(p, e, count, generator) @ columns for p, e, columns in examples])
        return mixed.T @ mixed / (len(self.p) * POSITIONS)

    def subset(self, count: int, seed: int) -> Tensor:
        """Return ``G`` of ``count`` examples, exactly."""
        chosen = torch.randperm(len(self.p), generator=torch.Generator().manual_seed(seed))[:count]
        columns = self.columns[chosen].flatten(0, 1)
        return columns.T @ columns / (len(chosen) * POSITIONS)

    def answers(self, G: Tensor, steps: int, *, rescale: bool = True, exact: bool = False) -> Tensor:
        """Return two-level answers on an estimate, or block Krylov steps.

        The steps are on the same estimate, from the coarse space; or, if ``exact``, on the matrix itself,
        preconditioned by the two-level operator that the estimate made.
        """
        anchors = {
            name: DenseGradients(block[None])
            for name, block in self.layout.split(self.train[:ANCHORS]).items()
        }
        Q, mixing = build_directions(self.layout, self.inverse, anchors)
        W = draw_probes(4, self.layout.numel, Q)
        space = CoarseSpace(self.layout, Q, Q @ G, W @ G, mixing, anchors, self.inverse, TRAIN)
        if not steps:
            inverse = rescale_inverse(self.inverse, space) if rescale else self.inverse
            return TwoLevel(inverse, space).solve(self.queries)
        if exact:
            operator = TwoLevel(rescale_inverse(self.inverse, space), space)
            return block_krylov(
                lambda v: v @ self.G + self.damping * v,
                operator.solve,
                Subspace(self.queries),
                max_steps=steps,
                tolerance=0.0,
            ).solutions
        return block_krylov(
            lambda v: v @ G + self.damping * v,
            self.inverse.apply,
            Subspace(self.queries, (Q, Q @ G + self.damping * Q)),
            max_steps=steps,
            tolerance=0.0,
        ).solutions

    def figures(self, G: Tensor, steps: int = 0) -> tuple[float, float, float]:
        """Return the error of ``Q^T G Q``, the residual and the correlation of scores with exact ones."""
        vectors = self.inverse.apply(self.train[:ANCHORS])
        Q = torch.linalg.qr(vectors.T).Q.double()
        small = Q.T @ (self.G.double() @ Q) + self.damping * torch.eye(Q.shape[1])
        root = torch.linalg.cholesky(small)
        change = Q.T @ ((G - self.G).double() @ Q)
        white = torch.linalg.solve_triangular(root, change, upper=False)
        white = torch.linalg.solve_triangular(root, white.T, upper=False)
        x = self.answers(G, steps)
        residual = self.queries - (x @ self.G + self.damping * x)
        relative = (residual.norm(dim=1) / self.queries.norm(dim=1)).median()
        return float(torch.linalg.matrix_norm(white, 2)), float(relative), self.agreement(x)

    def agreement(self, x: Tensor) -> float:
        """Return the mean rank correlation of a query's scores with the exact ones."""
        ranks = [(y @ self.train.T).argsort(1).argsort(1).float() for y in (x, self.exact)]
        centred = [functional.normalize(r - r.mean(1, keepdim=True), dim=1) for r in ranks]
        return float((centred[0] * centred[1]).sum(1).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--damping", type=float, default=1.5e-2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problem = Problem(arguments.damping)
    numel, K = problem.layout.numel, POSITIONS * CLASSES
    console = Console()
    console.print(f"{numel} parameters, {K} columns, {TRAIN} examples, {ANCHORS} anchors")
    console.print(
        f"EK-FAC alone: rank correlation {problem.agreement(problem.inverse.apply(problem.queries)):.3f}"
    )
    plain = problem.agreement(problem.answers(problem.G, 0, rescale=False))
    console.print(f"Two-level on the exact matrix without rescaling: {plain:.3f}")
    heads = (
        "estimate",
        "gradients",
        "error of T",
        "residual",
        "correlation",
        "after 2 Krylov steps",
        "1 exact step",
        "2",
        "3",
    )
    table = Table(*heads)

    def show(name: str, gradients: str, make: Callable[[int], Tensor], seeds: int) -> None:
        found = []
        for seed in range(seeds):
            G = make(seed)
            exact = [problem.agreement(problem.answers(G, steps, exact=True)) for steps in (1, 2, 3)]
            found.append((*problem.figures(G), problem.figures(G, 2)[2], *exact))
        mean = torch.tensor(found).mean(0).tolist()
        table.add_row(name, gradients, *(f"{value:.3f}" for value in mean))

    for count in arguments.draws:
        for name, make in ESTIMATES.items():
            show(name, str(count), lambda s, m=make, c=count: problem.estimate(m, c, s), arguments.seeds)
    for share in (8, 4, 2):
        show(
            f"1/{share} of the examples",
            f"{K} of 1/{share}",
            lambda s, d=share: problem.subset(TRAIN // d, s),
            arguments.seeds,
        )
    show("exact", str(K), lambda s: problem.G, 1)
    console.print(table)


if __name__ == "__main__":
    main()
