"""LiSSA's derived hyperparameters, predicted against observed.

``python examples/benchmarks/lissa.py [--fast] [model ...]``. Two tables:

- the smallest minibatch with which steps of ``1 / (lambda_1 + damping)`` are stable. Published: ``kappa Tr(H)
  / (lambda_1 + damping)`` (Klochkov and Liu 2024). Predicted: that times ``lambda_1 / (lambda_1 + damping)``,
  for batches drawn without replacement from ``N`` examples; both are sufficient, not necessary. Observed: the
  smallest batch with which the mean square of errors falls, over several runs.
- ``method="lissa"`` with nothing but a damping, and with minibatches of the predicted size: which way it
  takes, what it predicted to cost and what it cost (in passes over the data), its relative error, and the
  products of ``method="cg"`` to the same error.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.table import Table
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

from lightning_influence import InfluenceModule
from lightning_influence.curvature.stored import StoragePass, StoredGaussNewton
from lightning_influence.model.layers.plan import Layout, find_layers
from lightning_influence.running.loop_runner import LoopRunner
from lightning_influence.running.reading import prepare_train

DAMPINGS = (1e-2, 0.3, 5.0)
RUNS, STARTS = 4, 4
# Steps of a run: the error's size over the last half tells whether it falls.
STEPS = 60
# Below this damping, minibatches of the smallest size take too many steps for a table.
LEAST_FOR_MINIBATCHES = 0.1
# Products of conjugate gradients that are tried.
MOST_PRODUCTS = 64


class Module(lightning.LightningModule):
    """A network and its loss, which is all that influence asks for."""

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's mean loss."""
        return self.loss(self.net(batch[0]), batch[1])


@dataclass(frozen=True)
class Problem:
    """One trained module with its data: 8 queries, the rest for training."""

    name: str
    module: Module
    x: Tensor
    y: Tensor

    @property
    def train(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of training examples."""
        return list(zip(self.x[8:].split(256), self.y[8:].split(256), strict=True))

    @property
    def queries(self) -> list[tuple[Tensor, Tensor]]:
        """One batch of queries."""
        return [(self.x[:8], self.y[:8])]


def _fit(name: str, net: nn.Module, loss: Any, data: tuple[Any, Any], steps: int = 200) -> Problem:
    """Return a problem, trained by full-batch Adam in float64."""
    x, y = (torch.as_tensor(part) for part in data)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].double(), y[order]
    module = Module(net.double(), loss)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        module.training_step((x[8:], y[8:]), 0).backward()
        optimizer.step()
    return Problem(name, module, x, y)


def _standard(x: Any) -> Any:
    return (x - x.mean(0)) / x.std(0)


def _digits() -> tuple[Any, Any]:
    x, y = datasets.load_digits(return_X_y=True)
    return x / 16, y


def softmax_regression() -> Problem:
    """Digits, convex: 650 parameters."""
    return _fit("softmax regression", nn.Linear(64, 10), functional.cross_entropy, _digits())


def mlp() -> Problem:
    """Digits, 64-24-10: 1,810 parameters."""
    net = nn.Sequential(nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 10))
    return _fit("digits MLP", net, functional.cross_entropy, _digits())


def cnn() -> Problem:
    """Digits as images: 1,034 parameters."""
    net = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 13),
        nn.Tanh(),
        nn.Linear(13, 10),
    )
    return _fit("digits CNN", net, functional.cross_entropy, _digits())


def cancer() -> Problem:
    """Breast cancer, binary: 341 parameters."""
    x, y = datasets.load_breast_cancer(return_X_y=True)
    net = nn.Sequential(nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 1), nn.Flatten(0))
    return _fit(
        "cancer MLP",
        net,
        functional.binary_cross_entropy_with_logits,
        (_standard(x), torch.as_tensor(y).double()),
    )


def diabetes() -> Problem:
    """Diabetes, regression: 241 parameters."""
    x, y = datasets.load_diabetes(return_X_y=True)
    net = nn.Sequential(nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 1))
    return _fit("diabetes MLP", net, functional.mse_loss, (_standard(x), _standard(y)[:, None]))


PROBLEMS = {f.__name__: f for f in (softmax_regression, mlp, cnn, cancer, diabetes)}


def curvature_of(problem: Problem) -> StoredGaussNewton:
    """Return the Gauss-Newton matrix with its gradients in memory."""
    runner, plan, train = (
        LoopRunner(problem.module),
        find_layers(problem.module),
        prepare_train(problem.train),
    )
    one_pass = StoragePass(plan, limit=2**32, num_examples=train.num_examples)
    runner.run(one_pass, train)
    return one_pass.operator(Layout.of(plan.layers), train.indices, runner.all_reduce_sum)


def grows(curvature: StoredGaussNewton, damping: float, step: float, batch: int, steps: int) -> bool:
    """Return whether the mean square of an error grows from the middle of the runs to their end."""
    middle, end = 0.0, 0.0
    generator = torch.Generator().manual_seed(1)
    for run in range(RUNS):
        start = torch.randn(STARTS, curvature.numel, generator=generator, dtype=torch.float64)
        error = functional.normalize(curvature.product(start), dim=1)
        for number in range(steps):
            pushed = curvature.batch_product(error, batch, run * steps + number) + damping * error
            error = error - step * pushed
            if number == steps // 2:
                middle += float(error.square().sum())
        end += float(error.square().sum())
    return not end < middle


def smallest_stable(curvature: StoredGaussNewton, damping: float, step: float, steps: int) -> int:
    """Return the smallest batch with which errors fall, by bisection."""
    low, high = 0, 1
    while grows(curvature, damping, step, high, steps) and high < curvature.num_examples:
        low, high = high, min(2 * high, curvature.num_examples)
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if grows(curvature, damping, step, middle, steps) else (low, middle)
    return high


def ask(problem: Problem, method: str, damping: float, **options: Any) -> tuple[Tensor, Any]:
    """Return the queries' solutions ``(Q, P)`` and the diagnostics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer, diagnostics = InfluenceModule(problem.module).ihvp(
            problem.train, problem.queries, method=method, damping=damping, **options
        )
    return torch.cat([part.flatten(1) for part in answer.values()], dim=1), diagnostics


def error_of(found: Tensor, exact: Tensor) -> float:
    """Return the largest relative error of a query."""
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())


def cost_row(
    problem: Problem, damping: float, found: Tensor, diagnostics: Any, exact: Tensor
) -> tuple[str, ...]:
    """Return what one call predicted, spent and reached."""
    plan, solver = diagnostics.extra["lissa"], diagnostics.extra["solver"]
    total = sum(len(batch[0]) for batch in problem.train)
    error, low, products = error_of(found, exact), 0, MOST_PRODUCTS
    while products - low > 1:
        middle = (low + products) // 2
        enough = error_of(ask(problem, "cg", damping, max_steps=middle, tolerance=0.0)[0], exact) <= error
        low, products = (low, middle) if enough else (middle, products)
    spent = solver["example_products"][0] / total if "example_products" in solver else solver["products"]
    return (
        problem.name,
        f"{damping:g}",
        plan["variant"],
        f"{plan['batch']}",
        f"{solver['steps'][0]}",
        f"{plan['cost'] / total:.1f}",
        f"{spent:.1f}",
        f"{error:.2%}",
        f"{products}",
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(PROBLEMS), help=f"of {', '.join(PROBLEMS)}")
    parser.add_argument("--fast", action="store_true", help="one damping and shorter runs")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models if name not in PROBLEMS]
    if unknown:
        parser.error(f"got {unknown}; accepted are {', '.join(PROBLEMS)}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    batches = Table(title="Smallest stable minibatch for steps of 1 / (lambda_1 + damping)")
    for column in (
        "model",
        "N",
        "P",
        "lambda_1",
        "Tr",
        "kappa",
        "damping",
        "published",
        "predicted",
        "observed",
    ):
        batches.add_column(column, justify="left" if column == "model" else "right")
    costs = Table(title='method="lissa": passes over the data predicted and spent (tolerance 0.02)')
    for column in ("model", "damping", "way", "batch", "steps", "predicted", "spent", "error", "CG products"):
        costs.add_column(column, justify="left" if column in {"model", "way"} else "right")
    for name in arguments.models:
        problem = PROBLEMS[name]()
        curvature = curvature_of(problem)
        for damping in DAMPINGS[1:2] if arguments.fast else DAMPINGS:
            exact, _ = ask(problem, "exact", damping)
            found, diagnostics = ask(problem, "lissa", damping)
            plan = diagnostics.extra["lissa"]
            step = 1.0 / (plan["lambda_1"] + damping)
            observed = smallest_stable(curvature, damping, step, STEPS // 4 if arguments.fast else STEPS)
            numbers = [f"{plan[key]:.3g}" for key in ("lambda_1", "trace", "kappa")]
            batches.add_row(
                problem.name,
                f"{curvature.num_examples}",
                f"{curvature.numel}",
                *numbers,
                f"{damping:g}",
                f"{plan['kappa'] * plan['trace'] / (plan['lambda_1'] + damping):.1f}",
                f"{plan['smallest_batch']}",
                f"{observed}",
            )
            costs.add_row(*cost_row(problem, damping, found, diagnostics, exact))
            if damping >= LEAST_FOR_MINIBATCHES:
                few = ask(problem, "lissa", damping, batch_size=plan["smallest_batch"])
                costs.add_row(*cost_row(problem, damping, *few, exact))
    console = Console(width=120)
    console.print(batches)
    console.print(costs)


if __name__ == "__main__":
    main()
