"""Training many small models at once: their parameters are stacked, their steps taken together.

A model of a few thousand parameters leaves a CPU waiting for Python; ``K`` of them in one batched product do
not. Each member has its own examples; its initial values and its order of batches follow from its seed.
:func:`retrain` measures queries under models of many subsets, the counterfactuals that attribution scores
predict, and keeps finished runs on disk. Every tensor of the models and of their optimizer has a leading
dimension ``K``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from recipes import Recipe, draw_orders
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_influence.evaluation.harness.retraining import check_distinct_models
from lightning_influence.evaluation.harness.run import derive_seed
from lightning_influence.evaluation.losses import ExampleLoss, cross_entropy
from lightning_influence.support.arguments import check_losses, check_masks, read_seeds
from lightning_influence.support.errors import CorruptFileError, NonFiniteError, UnsupportedModelError
from lightning_influence.support.storage import write_atomically

Measurement = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int], None]
Factory = Callable[[], nn.Module]
Stacked = dict[str, Tensor]


_FORMAT = "1"
_DRAWS = "paired"  # how runs draw initial values and orders: names the folder of their results


@dataclass(frozen=True)
class Member:
    """One training run: the examples it keeps, boolean ``(N,)``, and its seed."""

    mask: Tensor
    seed: int


_Step = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor, int, Recipe], None]


def _sgd(
    value: Tensor, grad: Tensor, moments: Sequence[Tensor], rate: Tensor, count: int, recipe: Recipe
) -> None:
    """``b <- momentum b + g + w theta``, ``theta <- theta - rate b``."""
    buffer = moments[0]
    buffer.mul_(recipe.momentum).add_(grad).add_(value, alpha=recipe.weight_decay)
    value.sub_(buffer * rate)


def _adam(
    value: Tensor, grad: Tensor, moments: Sequence[Tensor], rate: Tensor, count: int, recipe: Recipe
) -> None:
    """Adam with coupled weight decay: the decay is part of the gradient."""
    _adam_update(value, grad.add(value, alpha=recipe.weight_decay), moments, rate, count, recipe)


def _adamw(
    value: Tensor, grad: Tensor, moments: Sequence[Tensor], rate: Tensor, count: int, recipe: Recipe
) -> None:
    """Adam with decoupled weight decay: ``theta <- (1 - rate w) theta`` before the update."""
    value.mul_(1 - rate * recipe.weight_decay)
    _adam_update(value, grad, moments, rate, count, recipe)


def _adam_update(
    value: Tensor, grad: Tensor, moments: Sequence[Tensor], rate: Tensor, count: int, recipe: Recipe
) -> None:
    (first, second), (beta1, beta2) = moments, recipe.betas
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = second.sqrt().div_((1 - beta2**count) ** 0.5).add_(recipe.eps)
    value.sub_(first / root * (rate / (1 - beta1**count)))


# How many moments an optimizer keeps for a parameter, and its step.
_RULES: dict[str, tuple[int, _Step]] = {"sgd": (1, _sgd), "adam": (2, _adam), "adamw": (2, _adamw)}


class StackedOptimizer:
    """The optimizer of ``K`` runs, which all start together.

    Args:
        parameters: stacked parameters, ``(K, ...)`` each; changed in place by every step.
        recipe: the optimizer and its settings; the learning rates are given to :meth:`step`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], recipe: Recipe) -> None:
        self._recipe, self._count = recipe, 0
        moments, self._rule = _RULES[recipe.optimizer]
        self._values = list(parameters.values())
        self._moments = [[torch.zeros_like(value) for _ in range(moments)] for value in self._values]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], rates: Tensor) -> None:
        """Take one step.

        Args:
            grads: one for each parameter, in order, of its shape.
            rates: learning rate of each run, ``(K,)``; 0 for one that is over.
        """
        self._count += 1
        for value, grad, moments in zip(self._values, grads, self._moments, strict=True):
            rate = rates.to(value.dtype).view(-1, *[1] * (value.ndim - 1))
            self._rule(value, grad, moments, rate, self._count, self._recipe)


def build(factory: Factory, member: Member) -> nn.Module:
    """Freshly initialised model of a member, the same for every member with this seed.

    The global random state is left as it was.

    Args:
        factory: makes a model, drawing its initial values from torch's global CPU generator.
        member: whose seed decides the initial values.

    Returns:
        The model, in training mode.

    Raises:
        UnsupportedModelError: if the model keeps running statistics, which stacked training cannot update.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(member.seed, "init"))
        model = factory().train()
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            raise UnsupportedModelError(
                f"Layer {name!r} ({type(module).__name__}) updates running statistics, which training many "
                "models at once cannot do. Use track_running_stats=False, or another normalisation."
            )
    return model


def stack_state(models: Sequence[nn.Module]) -> Stacked:
    """Return copies of the parameters and buffers of ``K`` like models, stacked to ``(K, ...)`` each."""
    tables = [{**dict(model.named_parameters()), **dict(model.named_buffers())} for model in models]
    return {name: torch.stack([table[name].detach() for table in tables]) for name in tables[0]}


def stacked_outputs(model: nn.Module, parameters: Stacked, inputs: Tensor, *, shared: bool) -> Tensor:
    """Outputs of ``K`` models.

    Args:
        model: the architecture; its own values are used only for what is not in ``parameters``.
        parameters: stacked parameters and buffers, ``(K, ...)`` each.
        inputs: ``(B, ...)`` for all models if ``shared``, else ``(K, B, ...)``.
        shared: whether every model sees the same inputs.

    Returns:
        Outputs, ``(K, B, ...)``.
    """

    def forward(values: Stacked, x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(model, values, (x,))
        return outputs

    batched = vmap(forward, in_dims=(0, None if shared else 0), randomness="different")
    result: Tensor = batched(parameters, inputs)
    return result


def _build_all(factory: Factory, members: Sequence[Member]) -> list[nn.Module]:
    """Return every member's model, of a factory that gives each run parameters of its own."""
    models = [build(factory, member) for member in members]
    # One model alone cannot tell. What is frozen the runs may share: training works on copies.
    others = models[1:] or [build(factory, members[0])]
    for model, other in zip(models, others, strict=False):
        check_distinct_models(model, other, frozen=False)
    return models


def _schedule(members: Sequence[Member], recipe: Recipe) -> Tensor:
    """Return the indices of every step, ``(K, steps, B)``; -1 where a batch is short or a run is over."""
    rows = []
    for member in members:
        padding = -int(member.mask.sum()) % recipe.batch_size
        orders = [
            nn.functional.pad(order, (0, padding), value=-1)
            for order in draw_orders(member.mask, recipe, member.seed)
        ]
        rows.append(torch.cat(orders).to(torch.int32).view(-1, recipe.batch_size))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _batches(schedule: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices and weights of every step, ``(K, B)``; weights sum to 1, or 0 once a run is over."""
    for index in schedule.unbind(1):
        valid = index >= 0
        width = int(valid.sum(1).max())
        valid = valid[:, :width]
        yield index[:, :width].clamp(min=0).long(), valid / valid.sum(1, keepdim=True).clamp(min=1)


def train_members(
    factory: Factory,
    recipe: Recipe,
    data: tuple[Tensor, Tensor],
    members: Sequence[Member],
    loss: ExampleLoss = cross_entropy,
) -> Stacked:
    """Train ``K`` models at once, each as a run of its own would.

    Args:
        factory: makes a freshly initialised model whose ``forward`` takes a batch of inputs.
        recipe: optimizer, schedule, epochs and batch size.
        data: inputs ``(N, ...)`` and targets ``(N, ...)``.
        members: the runs; they may keep different numbers of examples.
        loss: per-example training loss of outputs and targets, ``(B,)``.

    Returns:
        The trained parameters, frozen ones and buffers with them, each stacked to ``(K, ...)``.

    Raises:
        ValueError: if there is no member, one keeps nothing, or the loss is not per example.
        UnsupportedModelError: if the factory does not make a model of its own for each run.
        NonFiniteError: if a run diverged.
    """
    if not members or not all(bool(member.mask.any()) for member in members):
        raise ValueError("Retraining needs at least one run, and every run at least one kept example.")
    models = _build_all(factory, members)
    state, template = stack_state(models), models[0]
    leaves = {
        name: state[name].requires_grad_() for name, p in template.named_parameters() if p.requires_grad
    }
    optimizer = StackedOptimizer(leaves, recipe)
    totals = [recipe.steps(int(member.mask.sum())) for member in members]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(derive_seed(members[0].seed, "noise"))
        for step, (index, weight) in enumerate(_batches(_schedule(members, recipe))):
            outputs = stacked_outputs(template, state, data[0][index], shared=False)
            losses = loss(outputs.flatten(0, 1), data[1][index].flatten(0, 1))
            check_losses(losses, index.numel(), "loss")
            total = losses @ weight.to(losses).flatten()
            rates = torch.tensor([recipe.rate(step, steps) for steps in totals], dtype=torch.float64)
            optimizer.step(torch.autograd.grad(total, list(leaves.values())), rates)
    trained = {name: value.detach() for name, value in state.items()}
    for row, member in enumerate(members):
        # Buffers may be infinite by design: an attention mask is.
        if not all(bool(trained[name][row].isfinite().all()) for name in leaves):
            raise NonFiniteError(
                f"The run with seed {member.seed} on {int(member.mask.sum())} examples diverged: its "
                "parameters are not finite. Lower the recipe's learning rate."
            )
    return trained


def _source(thing: Any) -> str:
    """Return the source text where there is one, else the qualified name."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(type(thing)))}"


def _describe(model: nn.Module) -> list[str]:
    """Return an architecture in words: modules, tensors' names and shapes, sources of classes not torch's."""
    own = {type(m) for m in model.modules() if not type(m).__module__.startswith("torch.")}
    shapes = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in model.state_dict().items()]
    return [repr(model), *shapes, *sorted(map(_source, own))]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that decide a run; Adam's do not exist for SGD, whose older results stay valid."""
    settings = asdict(recipe)
    if recipe.optimizer == "sgd":
        for name in ("optimizer", "betas", "eps"):
            del settings[name]
    return settings


def fingerprint(
    factory: Factory,
    recipe: Recipe,
    tensors: Iterable[Tensor],
    functions: Iterable[Callable[..., Any]] = (),
) -> str:
    """Hash of what decides a retraining's results, members aside.

    Functions and the model's classes count by their own source text alone, the model by its shapes as well;
    numbers that they take from elsewhere do not count, and an edit of those needs an emptied cache.

    Args:
        factory: makes the model.
        recipe: every field that its optimizer uses counts.
        tensors: the data, by value.
        functions: loss and measurement.

    Returns:
        20 hexadecimal digits.
    """
    with torch.random.fork_rng(devices=[]):
        words = [_FORMAT, json.dumps(_settings(recipe)), *_describe(factory()), _source(factory)]
    found = hashlib.sha256("\0".join([*words, *map(_source, functions)]).encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:20]


def _key(member: Member) -> str:
    return hashlib.sha256(member.mask.numpy().tobytes() + f"|{member.seed}".encode()).hexdigest()[:24]


def _load(directory: Path) -> dict[str, Tensor]:
    """Return the values of every member that is stored in ``directory``."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            found |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(
                f"{path} cannot be read ({error}). Delete it: the runs it held will be repeated."
            ) from error
    return found


def _store(values: dict[str, Tensor], directory: Path) -> None:
    """Write one chunk under a name of its own; readers see the whole file or none."""
    name = hashlib.sha256("".join(sorted(values)).encode()).hexdigest()[:24]
    with write_atomically(directory / f"{name}.safetensors") as temporary:
        save_file(values, temporary)


def _check(data: tuple[Tensor, Tensor], masks: Tensor, chunk: int) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        ValueError: saying what was got.
    """
    check_masks(masks, len(data[0]))
    if len(data[0]) != len(data[1]):
        raise ValueError(f"Got {len(data[0])} training inputs but {len(data[1])} targets.")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")


def _check_measured(values: Any, count: int) -> None:
    """Refuse measured values that are not one, or several, for each of ``count`` queries.

    Raises:
        ValueError: saying what was got.
    """
    if not isinstance(values, Tensor) or values.ndim != 1 or not len(values) or len(values) % count:
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(
            f"`measurement` returned {got}; accepted is one value a query, ({count},), or several: all "
            "queries' first, all queries' second. A loss of torch needs reduction=\"none\"."
        )


@torch.no_grad()
def measure_members(
    factory: Factory,
    parameters: dict[str, Tensor],
    queries: tuple[Tensor, Tensor],
    measurement: Measurement = cross_entropy,
) -> Tensor:
    """Measurement of every query under each of ``K`` models, in eval mode.

    Args:
        factory: makes the architecture.
        parameters: stacked parameters, ``(K, ...)`` each.
        queries: inputs ``(Q, ...)`` and targets ``(Q, ...)``.
        measurement: per-example value of outputs and targets, ``(B,)``, or several values of each example.

    Returns:
        Measured values, ``(K, Q)``.

    Raises:
        ValueError: if the measurement is not per example.
    """
    with torch.random.fork_rng(devices=[]):
        model = factory().eval()
    outputs = stacked_outputs(model, parameters, queries[0], shared=True)
    values = [measurement(output, queries[1]) for output in outputs]
    for value in values:
        _check_measured(value, len(queries[0]))
    return torch.stack(values)


def retrain(
    factory: Factory,
    recipe: Recipe,
    data: tuple[Tensor, Tensor],
    masks: Tensor,
    seeds: Sequence[int] | Tensor,
    *,
    queries: tuple[Tensor, Tensor],
    loss: ExampleLoss = cross_entropy,
    measurement: Measurement = cross_entropy,
    cache_dir: str | Path | None = None,
    chunk: int = 64,
    progress: Progress | None = None,
) -> Tensor:
    """Measured values of models retrained on subsets, every subset with every seed.

    Subsets share their random numbers: the initial values depend on the seed only, and each epoch visits the
    kept examples in the order that one permutation of all examples gives them, a function of the seed and the
    epoch only. Taken alone, a run is distributed like any other run on its subset, so the mean over seeds
    estimates the same expected value as independent draws would. Across subsets, the noise that all runs of a
    seed share cancels in a rank correlation, which compares subsets with each other; a difference between
    subsets therefore has less variance. The values of one seed are not independent of each other, and an
    interval from resampling subsets holds for these seeds.

    A run depends on its subset and its seed alone, so adding subsets or seeds later repeats nothing (a model
    with dropout also draws its noise per chunk, and shares none of it).

    With ``cache_dir``, finished runs are found again under their :func:`fingerprint`.

    Args:
        factory: makes a freshly initialised model whose ``forward`` takes a batch of inputs.
        recipe: optimizer, schedule, epochs and batch size.
        data: training inputs ``(N, ...)`` and targets ``(N, ...)``.
        masks: kept examples of each subset, boolean, ``(M, N)``.
        seeds: ``S`` different seeds, a sequence, a tensor or an array.
        queries: query inputs ``(Q, ...)`` and targets ``(Q, ...)``.
        loss: per-example training loss of outputs and targets, ``(B,)``.
        measurement: what is measured on a query, per example, ``(Q,)``; the loss by default. Of several
            values a query, the first of all queries come first: ``(2 Q,)``.
        cache_dir: where finished runs are kept; nothing is kept without it.
        chunk: how many runs are trained at once, and stored together.
        progress: called as ``progress(done, total)`` after every chunk.

    Returns:
        Measured values, ``(M, S, Q)``.

    Raises:
        ValueError: if arguments do not fit together, or the loss or the measurement is not per example.
        UnsupportedModelError: if the factory does not make a model of its own for each run.
        NonFiniteError: if a run diverged.
    """
    _check(data, masks, chunk)
    chosen = read_seeds(seeds)
    members = [Member(mask, seed) for mask in masks.cpu() for seed in chosen]
    directory, found = None, {}
    if cache_dir is not None:
        mark = fingerprint(factory, recipe, (*data, *queries), (loss, measurement))
        directory = Path(cache_dir) / f"{_DRAWS}-{mark}"
        found = _load(directory)
    missing = list({_key(m): m for m in members if _key(m) not in found}.items())
    for start in range(0, len(missing), chunk):
        keys, part = zip(*missing[start : start + chunk], strict=True)
        trained = train_members(factory, recipe, data, part, loss)
        values = measure_members(factory, trained, queries, measurement)
        fresh = {key: value.clone() for key, value in zip(keys, values, strict=True)}
        if directory is not None:
            _store(fresh, directory)
        found |= fresh
        if progress is not None:
            progress(len(members) - len(missing) + start + len(part), len(members))
    return torch.stack([found[_key(m)] for m in members]).view(len(masks), len(chosen), -1)
