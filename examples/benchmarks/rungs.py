"""The upper rungs of the ladder on the digits MLP: Hessian, Gauss-Newton matrix, its blocks, and EK-FAC.

Run ``python examples/benchmarks/rungs.py [--subsets M] [--seeds S]``. It prints the spectrum of the trained
model's Hessian, how far each rung is from the one above, and the linear datamodeling score (LDS) of every
rung over a grid of dampings, with each way to deal with the Hessian's negative curvature.
"""

from __future__ import annotations

import argparse
import warnings
from itertools import pairwise

import torch
from decomposition import compare, diagonal_blocks
from rich.console import Console
from rich.table import Table
from stacked_training import retrain
from tasks import CACHE, digits_mlp
from torch import Tensor
from truth import CHUNK, Truth

from lightning_influence import InfluenceModule
from lightning_influence.curvature.inverse import BlockInverse
from lightning_influence.curvature.operators import GaussNewtonOperator, HessianOperator
from lightning_influence.evaluation import random_subsets
from lightning_influence.methods.closed_form import invert_blocks, take_eigenvalues
from lightning_influence.methods.gathering import GradientPass
from lightning_influence.model.layers.plan import Layout, find_layers
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.running.reading import prepare_train

DAMPINGS = (1e-4, 3e-4, 1e-3, 1.8e-3, 3e-3, 1e-2)


class Source:
    """The task's trained model with its layers, data and runner."""

    def __init__(self) -> None:
        self.task = digits_mlp()
        self.module = self.task.trained()
        self.runner = LoopRunner(self.module)
        self.plan = find_layers(self.module)
        self.train = prepare_train(self.task.pass_loader())
        self.layout = Layout.of(self.plan.layers)

    def gradients(self, queries: bool) -> Tensor:
        """Return gradients of the training losses ``(N, P)``, or of the queries' ``(Q, P)``."""
        one_pass = GradientPass(self.plan)
        table = self.task.queries if queries else self.task.train
        self.runner.run(one_pass, self.task.pass_loader(table))
        return self.layout.dense(one_pass.gradients)[0].double()

    def ekfac(self) -> Tensor:
        """Return EK-FAC's matrix in float64, from exact columns."""
        factors = InfluenceModule(self.module).fit_factors(self.task.pass_loader(), fisher="exact")
        undamped = dict.fromkeys(self.plan.layers, 0.0)
        inverse = invert_blocks(self.layout, factors, undamped, take_eigenvalues)
        double = {name: layer.to(dtype=torch.float64) for name, layer in inverse.layers.items()}
        matrix = BlockInverse(self.layout, double).multiply(torch.eye(self.layout.numel).double())
        return (matrix + matrix.T) / 2


def scores(eigen: tuple[Tensor, Tensor], damping: float, queries: Tensor, train: Tensor) -> Tensor:
    """Return ``(1/N) g_q^T (H + damping)^{-1} g_n`` from the eigenvalues and eigenvectors of ``H``."""
    values, vectors = eigen
    return ((queries @ vectors) / (values + damping)) @ (train @ vectors).T / len(train)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console()
    source = Source()
    task = source.task
    masks = random_subsets(len(task.train), 100, seed=0)[: arguments.subsets]
    losses = retrain(
        task.net,
        task.recipe,
        task.train.tensors,
        masks,
        range(arguments.seeds),
        queries=task.queries.tensors,
        cache_dir=CACHE / "truth" / task.name,
        chunk=CHUNK[task.name],
    )
    known = Truth(masks, losses)
    console.print(InfluenceModule(source.module).spectrum(task.pass_loader(), "hessian", minibatches=64))
    ggn = GaussNewtonOperator(source).dense()
    matrices = {
        "hessian": HessianOperator(source).dense(),
        "ggn": ggn,
        "block_ggn": torch.block_diag(*diagonal_blocks(ggn, source.layout).values()),
        "ekfac": source.ekfac(),
    }
    names = list(matrices)
    for above, below in pairwise(names):
        console.print(f"[bold]{below}[/bold] as an approximation of [bold]{above}[/bold]")
        console.print(compare(matrices[above], matrices[below], source.layout))
    eigen = {name: tuple(torch.linalg.eigh(matrix)) for name, matrix in matrices.items()}
    values, vectors = eigen.pop("hessian")
    rungs = {
        "hessian, absolute": (values.abs(), vectors),
        "hessian, clip": (values.clamp_min(0), vectors),
        "hessian, keep": (values, vectors),
        **eigen,
    }
    console.print(f"{int((values < -1e-9).sum())} of {len(values)} eigenvalues of the Hessian are negative")
    queries, train = source.gradients(True), source.gradients(False)
    table = Table("curvature", *(f"{damping:g}" for damping in DAMPINGS), title="LDS by damping")
    for name, pair in rungs.items():
        found = (known.lds(scores(pair, damping, queries, train), bootstrap=2)[0] for damping in DAMPINGS)
        table.add_row(name, *(f"{value:.3f}" for value in found))
    console.print(table)


if __name__ == "__main__":
    main()
