"""Tasks of millions of parameters, and converged answers to hold scores against where nothing is retrained.

``resnet10`` and ``language_small`` are of 1.2 and 1.3 million parameters; ``resnet18`` and ``language`` of 11
million each, with as few examples as two slow cores allow. All are trained briefly on made-up data that can
be learned. Nothing judges the scores of ``language``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from large_auto import correlate
from large_nets import language_net, resnet10_net, resnet18_net, small_language_net
from meter import TensorTable
from recipes import Recipe
from safetensors.torch import load_file
from tasks import CACHE, TASKS, Task, save_model
from torch import Tensor, nn
from torch.nn import functional

from lightning_influence import InfluenceModule
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.curvature.training_record import LayerRecord, TrainingRecord
from lightning_influence.model.layers.plan import find_layers

# Where nothing is retrained: the first queries' scores by CG of this residual are what others are held to.
CONVERGED = {"large_mlp", "transformer", "resnet10", "resnet18", "language_small"}
CONVERGED_QUERIES, CONVERGED_RESIDUAL = 3, 1e-2


def _draw_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy images of one smooth pattern a class; a tenth of the labels are wrong."""
    patterns = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(10, (count,), generator=generator)
    clean = functional.interpolate(patterns, size=(32, 32), mode="bilinear")[labels]
    noisy = clean + 0.9 * torch.randn(clean.shape, generator=generator)
    wrong = torch.rand(count, generator=generator) < 0.1
    return noisy, torch.where(wrong, torch.randint(10, (count,), generator=generator), labels)


def _draw_tokens(
    count: int, generator: torch.Generator, vocabulary: int, context: int
) -> tuple[Tensor, Tensor]:
    """Return sequences of a chain in which each token has few likely successors."""
    successors = torch.randint(vocabulary, (vocabulary, 3), generator=torch.Generator().manual_seed(7))
    tokens = [torch.randint(vocabulary, (count,), generator=generator)]
    for _ in range(context):
        chosen = torch.randint(3, (count,), generator=generator)
        tokens.append(successors[tokens[-1], chosen])
    sequence = torch.stack(tokens, dim=1)
    return sequence[:, :-1], sequence[:, 1:]


def _images(net: Callable[[], nn.Module], name: str, train: int, queries: int, batch: int) -> Task:
    generator = torch.Generator().manual_seed(1)
    tables = [TensorTable(*_draw_images(count, generator)) for count in (train, queries)]
    recipe = Recipe(0.02, epochs=6, batch_size=32, momentum=0.9, weight_decay=1e-4)
    return Task(name, net, tables[0], tables[1], recipe, pass_batch=batch)


def _tokens(
    net: Callable[[], nn.Module], name: str, vocabulary: int, context: int, train: int, queries: int
) -> Task:
    generator = torch.Generator().manual_seed(1)
    tables = []
    for count in (train, queries):
        inputs, targets = _draw_tokens(count, generator, vocabulary, context)
        tables.append(TensorTable(inputs.contiguous(), targets.contiguous()))
    recipe = Recipe(0.1, epochs=10, batch_size=16, momentum=0.9, weight_decay=1e-4)
    return Task(name, net, tables[0], tables[1], recipe, pass_batch=32)


def resnet10() -> Task:
    """256 images of 32 x 32 in 10 classes, 16 queries."""
    return _images(resnet10_net, "resnet10", 256, 16, batch=64)


def resnet18() -> Task:
    """512 images of 32 x 32 in 10 classes, 16 queries."""
    return _images(resnet18_net, "resnet18", 512, 16, batch=64)


def language_small() -> Task:
    """256 sequences of 32 of 2,000 tokens, 16 queries."""
    return _tokens(small_language_net, "language_small", 2000, 32, 256, 16)


def language() -> Task:
    """128 sequences of 32 of 5,000 tokens, 8 queries."""
    return _tokens(language_net, "language", 5000, 32, 128, 8)


LARGE: dict[str, Callable[[], Task]] = {
    task.__name__: task for task in (resnet10, resnet18, language_small, language)
}
ALL_TASKS = {**TASKS, **LARGE}


def fresh_module(task: Task, model: nn.Module) -> InfluenceModule:
    """Return the model without factors, but with the record of its training."""
    recipe, steps = task.recipe, task.recipe.steps(len(task.train))
    rate = sum(recipe.rate(k, steps) for k in range(steps)) / (1 - recipe.momentum)
    layers = {name: LayerRecord(rate, recipe.weight_decay) for name in find_layers(model).layers}
    record = TrainingRecord(family="sgd", steps=steps, layers=layers)
    return InfluenceModule(model, state=InfluenceState(record=record))


def solve(task: Task) -> Tensor:
    """Scores ``(CONVERGED_QUERIES, N)`` by CG, to ``CONVERGED_RESIDUAL``; cached.

    Args:
        task: one of ``CONVERGED``.

    Returns:
        The scores.

    Raises:
        RuntimeError: if CG did not get there.
    """
    path = CACHE / "converged" / task.model_path(0).name
    if not path.exists():
        model = task.trained()
        queries = task.pass_loader(task.queries.head(CONVERGED_QUERIES))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = fresh_module(task, model).scores(
                task.pass_loader(), queries, method="cg", tolerance=CONVERGED_RESIDUAL, max_steps=300
            )
        residuals = answer.diagnostics.residuals
        assert answer.scores is not None
        assert residuals is not None
        if float(residuals.max()) > CONVERGED_RESIDUAL:
            raise RuntimeError(f"CG on {task.name} ended with residuals up to {float(residuals.max()):.2g}.")
        save_model({"scores": answer.scores.contiguous(), "residuals": residuals}, path)
    return load_file(path)["scores"]


def correlate_with_converged(task: Task, scores: Tensor) -> float:
    """Mean rank correlation of the first queries' scores ``(Q, N)`` with those of converged CG."""
    target = solve(task)
    return correlate(scores[: len(target)], target)
