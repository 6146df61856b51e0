"""Reading a user's loaders for passes: every example once, in evaluation order, with its index."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_influence.running.counting import ACCEPTED
from lightning_influence.running.generators import preserve_generators
from lightning_influence.running.host.attributes import combined_mode, wrapped_sampler
from lightning_influence.running.host.packages import is_lightning
from lightning_influence.running.loaders import IndexedLoader, ReadyMade, rebuilt, split_indices
from lightning_influence.running.streams import Stream
from lightning_influence.support.errors import UnsupportedDataError
from lightning_influence.support.notes import warn
from lightning_influence.support.random_states import preserve_rng


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
        warn(
            "WeightedRandomSampler draws some examples more often than others; influence takes every example "
            "that it can draw once. Multiply the scores by the weights for the weighted objective."
        )
    return positive.nonzero().flatten()


def own_batches(sampler: Any, dataset: Any) -> tuple[list[Tensor], bool]:
    """Return the batches of the user's batch sampler without what it repeats, and whether it repeats any."""
    seen: set[int] = set()
    batches, count = [], 0
    for batch in _drawn(sampler, dataset):
        fresh = [i for i in dict.fromkeys(_index(item, dataset) for item in batch) if i not in seen]
        seen.update(fresh)
        count += len(batch)
        if fresh:
            batches.append(torch.tensor(fresh))
    _warn_of_missing(seen, sampler, dataset)
    return batches, count > len(seen)


def _drawn(sampler: Any, dataset: Any) -> list[Any]:
    # One iteration over a sampler that is not torch's own, leaving every random generator as it was.
    limit = 10 * max(_length(sampler), _length(dataset)) + 10
    with preserve_rng(), preserve_generators(sampler):
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
        warn(
            f"{type(sampler).__name__} gave {len(indices)} of the dataset's {_length(dataset)} examples in "
            "one iteration; only those are visited. Pass a loader without it to visit all."
        )


def prepare(dataloaders: Any) -> list[IndexedLoader]:
    """Read one or several loaders, or ready-made batches.

    Args:
        dataloaders: a ``DataLoader``, a list or dict of them, a sequential ``CombinedLoader``, a list of
            batches, or what this function returned.

    Returns:
        One :class:`IndexedLoader` for each loader; a list of batches makes one.

    Raises:
        UnsupportedDataError: if a loader is empty or its examples have no index in a dataset.
        TypeError: if ``dataloaders`` is none of the accepted kinds, such as one batch that is in no list.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> [loader] = prepare(DataLoader(range(5), batch_size=2, shuffle=True, drop_last=True))
        >>> [indices.tolist() for _, indices in loader.shard()]
        [[0, 1], [2, 3, 4]]
    """
    if is_lightning(dataloaders, "CombinedLoader"):
        mode = combined_mode(dataloaders)
        if mode != "sequential":
            raise UnsupportedDataError(
                f"CombinedLoader(mode={mode!r}) joins batches of several datasets: examples have no index of "
                "their own. Use mode='sequential', or pass the loaders as a list."
            )
        dataloaders = dataloaders.flattened
    if isinstance(dataloaders, Mapping) and _are_loaders(dataloaders.values()):
        dataloaders = list(dataloaders.values())
    if isinstance(dataloaders, DataLoader | IndexedLoader):
        dataloaders = [dataloaders]
    if not isinstance(dataloaders, list | tuple):
        raise TypeError(f"Expected {ACCEPTED}; got {type(dataloaders).__name__}.")
    if isinstance(dataloaders, tuple) and all(isinstance(item, torch.Tensor) for item in dataloaders):
        raise TypeError(
            f"Got a tuple of {len(dataloaders)} tensors, which looks like one batch. Pass a list of batches, "
            f"[batch], or {ACCEPTED}."
        )
    if not dataloaders:
        raise UnsupportedDataError(f"The list of loaders is empty. Pass {ACCEPTED}.")
    if _are_loaders(dataloaders):
        return [item if isinstance(item, IndexedLoader) else read_loader(item) for item in dataloaders]
    if any(isinstance(item, DataLoader | IndexedLoader) for item in dataloaders):
        kinds = sorted({type(item).__name__ for item in dataloaders})
        raise TypeError(f"The list mixes loaders with something else ({', '.join(kinds)}). Pass {ACCEPTED}.")
    return [ReadyMade(dataloaders)]


def prepare_train(dataloaders: Any) -> IndexedLoader:
    """Return the one loader of the training examples, read.

    Raises:
        UnsupportedDataError: as :func:`prepare`, and if there are several loaders.
    """
    loaders = prepare(dataloaders)
    if len(loaders) > 1:
        raise UnsupportedDataError(
            f"Got {len(loaders)} training loaders; training examples are numbered through one dataset. "
            "Join the datasets with torch.utils.data.ConcatDataset and pass one DataLoader."
        )
    return loaders[0]


def read_loader(loader: DataLoader[Any]) -> IndexedLoader:
    """Return one ``DataLoader``, read.

    Examples have the dataset's indices where batches are drawn by these, by a sampler, a batch sampler, or a
    sampler of whole batches with ``batch_size=None``. Others are numbered in the order in which they come.

    Raises:
        UnsupportedDataError: for loaders without examples.
    """
    name = _find_stream(loader)
    if name is not None:
        read: IndexedLoader = Stream(loader, name)
        if not len(read):
            raise UnsupportedDataError(f"{name} has no examples. Pass a loader that has some.")
        return read
    batches, repeats = (loader.sampler if loader.batch_sampler is None else loader.batch_sampler), False
    if type(batches) is BatchSampler:
        indices, ordered = sampler_indices(batches.sampler, loader.dataset)
        size = batches.batch_size
        plan = list(torch.split(indices, size)) if len(indices) else []
        if batches.drop_last and plan:  # the user's fit saw no smaller batch
            plan = split_indices(indices, size)
    else:
        (plan, repeats), ordered = own_batches(batches, loader.dataset), False
    if not plan:
        raise UnsupportedDataError(
            f"The loader over {type(loader.dataset).__name__} has no examples. Pass one that has some."
        )
    total = len(loader.dataset) if isinstance(loader.dataset, Sized) else None
    return IndexedLoader(
        plan,
        lambda part: rebuilt(loader, part),
        ordered=ordered,
        size=total,
        source=loader,
        repeats=repeats,
    )


def _find_stream(loader: DataLoader[Any]) -> str | None:
    """Return the name of what gives batches whose examples have no index in a dataset; None if it is none."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        return type(loader).__name__
    if isinstance(loader.dataset, IterableDataset):
        return type(loader.dataset).__name__
    if loader.batch_sampler is None and not _draws_batches(loader.sampler):
        return type(loader.dataset).__name__
    return None


def _draws_batches(sampler: Any) -> bool:
    """Return whether a sampler, given as such with ``batch_size=None``, gives lists of indices."""
    if type(sampler) is BatchSampler:
        return True
    if type(sampler) in (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler):
        return False
    with preserve_rng(), preserve_generators(sampler):
        first = next(iter(sampler), None)
    return isinstance(first, list | tuple)


def _are_loaders(items: Iterable[Any]) -> bool:
    items = list(items)
    return bool(items) and all(isinstance(item, DataLoader | IndexedLoader) for item in items)
