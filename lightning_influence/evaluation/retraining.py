"""Retraining on many subsets of the training data: the counterfactuals that attribution scores predict.

Runs are trained side by side (:mod:`.stacked`), their measured values kept on disk under the hash of all that
decides the result: a changed model, recipe or data set never meets an old value, and an interrupted
computation goes on where it stopped. What code is made of is described by :mod:`.sources`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_influence.evaluation.fingerprints import beyond_source, describe, digest
from lightning_influence.evaluation.losses import cross_entropy
from lightning_influence.evaluation.recipe import Recipe
from lightning_influence.evaluation.stacked import (
    ExampleLoss,
    Factory,
    Member,
    stacked_outputs,
    train_members,
)
from lightning_influence.support.arguments import check_masks, check_measured, read_seeds
from lightning_influence.support.errors import CorruptFileError

Measurement = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int], None]
_FORMAT = "1"
_DRAWS = "paired"  # how runs draw initial values and orders: names the folder of their results


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

    Args:
        factory: makes the model; its source, what it closes over and names, the model's classes and its
            shapes all count. A class given as the factory counts by the sources of the model's classes.
        recipe: every field that its optimizer uses counts.
        tensors: the data, by value.
        functions: loss and measurement, by source and by what they close over and name.

    Returns:
        20 hexadecimal digits.

    Raises:
        TypeError: if a function closes over or names what cannot be described.
    """
    functions = [*functions]
    # Before the factory is called, which may change what it closes over.
    values = [word for function in (factory, *functions) for word in beyond_source(function)]
    with torch.random.fork_rng(devices=[]):
        words = [_FORMAT, json.dumps(_settings(recipe)), *_describe(factory()), _source(factory)]
    found = hashlib.sha256("\0".join([*words, *map(_source, functions), *values]).encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:20]


def _key(member: Member) -> str:
    return hashlib.sha256(member.mask.numpy().tobytes() + f"|{member.seed}".encode()).hexdigest()[:24]


def _load(directory: Path, sources: str) -> dict[str, Tensor]:
    """Return the values of every member that code of this digest stored in ``directory``.

    The folder's name does not tell the globals of a class given as the factory; its files do, except for
    those of versions that did not note them.

    Raises:
        CorruptFileError: if a file cannot be read.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                noted = (file.metadata() or {}).get("sources", sources)
            if noted == sources:
                found |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(
                f"{path} cannot be read ({error}). Delete it: the runs it held will be repeated."
            ) from error
    return found


def _store(values: dict[str, Tensor], directory: Path, sources: str) -> None:
    """Write one chunk under a name of its own; readers see the whole file or none."""
    directory.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256("".join([sources, *sorted(values)]).encode()).hexdigest()[:24]
    handle, temporary = tempfile.mkstemp(dir=directory, suffix=".partial")
    os.close(handle)
    try:
        save_file(values, temporary, {"sources": sources})
        os.replace(temporary, directory / f"{name}.safetensors")
    finally:
        Path(temporary).unlink(missing_ok=True)


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
        check_measured(value, len(queries[0]))
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

    With ``cache_dir``, the functions count with all that they are made of: the user's functions and classes
    that they name, the values of globals, defaults, closures and partials, the state of objects.

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
        TypeError: if the functions are made of what cannot be described, and values are kept.
        UnsupportedModelError: if the factory does not make a model of its own for each run.
        NonFiniteError: if a run diverged.
    """
    _check(data, masks, chunk)
    chosen = read_seeds(seeds)
    members = [Member(mask, seed) for mask in masks.cpu() for seed in chosen]
    directory, sources, found = None, "", {}
    if cache_dir is not None:
        sources = digest([word for thing in (factory, loss, measurement) for word in describe(thing)])
        mark = fingerprint(factory, recipe, (*data, *queries), (loss, measurement))
        directory = Path(cache_dir) / f"{_DRAWS}-{mark}"
        found = _load(directory, sources)
    missing = list({_key(m): m for m in members if _key(m) not in found}.items())
    for start in range(0, len(missing), chunk):
        keys, part = zip(*missing[start : start + chunk], strict=True)
        trained = train_members(factory, recipe, data, part, loss)
        values = measure_members(factory, trained, queries, measurement)
        fresh = {key: value.clone() for key, value in zip(keys, values, strict=True)}
        if directory is not None:
            _store(fresh, directory, sources)
        found |= fresh
        if progress is not None:
            progress(len(members) - len(missing) + start + len(part), len(members))
    return torch.stack([found[_key(m)] for m in members]).view(len(masks), len(chosen), -1)
