"""Which examples a user's sampler can draw, read without disturbing it."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_influence.errors import InfluenceWarning, UnsupportedDataError
from lightning_influence.host.attributes import wrapped_sampler
from lightning_influence.host.random_states import preserved_generators, preserved_rng


def sampler_indices(sampler: Any, dataset: Any) -> tuple[Tensor, bool]:
    """Return the distinct indices that a sampler can draw, and whether every process finds the same."""
    inner = wrapped_sampler(sampler)
    if inner is not None:
        return sampler_indices(inner, dataset)
    kind = type(sampler)
    if kind is SequentialSampler or kind is RandomSampler:
        return torch.arange(len(sampler.data_source)), True
    if kind is DistributedSampler:
        return torch.arange(len(sampler.dataset)), True
    if kind is SubsetRandomSampler:
        return _distinct(sampler.indices, dataset), True
    if kind is WeightedRandomSampler:
        return _weighted(sampler.weights), True
    indices = _distinct(_drawn(sampler, dataset), dataset)
    _warn_of_missing(indices, sampler, dataset)
    return indices, False


def _weighted(weights: Tensor) -> Tensor:
    weights = torch.as_tensor(weights)
    positive = weights > 0
    if len(set(weights[positive].tolist())) > 1:
        warnings.warn(
            "WeightedRandomSampler draws some examples more often than others; influence takes every example "
            "that it can draw once. Multiply the scores by the weights for the weighted objective.",
            InfluenceWarning,
            stacklevel=2,
        )
    return positive.nonzero().flatten()


def own_batches(loader: DataLoader[Any]) -> list[Tensor]:
    """Return the batches of the user's batch sampler, without what it repeats."""
    seen: set[int] = set()
    batches = []
    for batch in _drawn(loader.batch_sampler, loader.dataset):
        fresh = [i for i in dict.fromkeys(_index(item, loader.dataset) for item in batch) if i not in seen]
        seen.update(fresh)
        if fresh:
            batches.append(torch.tensor(fresh))
    _warn_of_missing(seen, loader.batch_sampler, loader.dataset)
    return batches


def _drawn(sampler: Any, dataset: Any) -> list[Any]:
    # One iteration over a sampler that is not torch's own, leaving every random generator as it was.
    limit = 10 * max(_length(sampler), _length(dataset)) + 10
    with preserved_rng(), preserved_generators(sampler, getattr(sampler, "sampler", None)):
        drawn = list(itertools.islice(iter(sampler), limit + 1))
    if len(drawn) > limit:
        raise UnsupportedDataError(
            f"{type(sampler).__name__} does not end: it gave more than {limit} items for "
            f"{_length(dataset)} examples. Pass a loader whose sampler goes over the dataset once."
        )
    return drawn


def _distinct(items: Iterable[Any], dataset: Any) -> Tensor:
    return torch.tensor(sorted({_index(item, dataset) for item in items}), dtype=torch.int64)


def _index(item: Any, dataset: Any) -> int:
    try:
        index = operator.index(item)
    except TypeError:
        raise UnsupportedDataError(
            f"The sampler gives {item!r} ({type(item).__name__}) as a dataset index; it must give integers."
        ) from None
    return index if index >= 0 else index + len(dataset)


def _length(sized: object) -> int:
    return len(sized) if isinstance(sized, Sized) else 0


def _warn_of_missing(indices: Sized, sampler: object, dataset: object) -> None:
    if 0 < len(indices) < _length(dataset):
        warnings.warn(
            f"{type(sampler).__name__} gave {len(indices)} of the dataset's {_length(dataset)} examples in "
            "one iteration; only those are visited. Pass a loader without it to visit all.",
            InfluenceWarning,
            stacklevel=2,
        )
