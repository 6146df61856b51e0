"""Reading a user's loaders for passes: every example once, in evaluation order, with its index."""

from __future__ import annotations

import itertools
import operator
import warnings
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

from lightning_influence.running.host.attributes import combined_mode, wrapped_sampler
from lightning_influence.running.host.packages import is_lightning
from lightning_influence.running.loaders import ACCEPTED, IndexedLoader, ReadyMade, rebuilt
from lightning_influence.support.errors import InfluenceWarning, UnsupportedDataError
from lightning_influence.support.random_states import preserve_generators, preserve_rng


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
    with preserve_rng(), preserve_generators(sampler, getattr(sampler, "sampler", None)):
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
        [[0, 1], [2, 3], [4]]
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
    """Return one ``DataLoader``, read; the top of this module says what becomes of its sampler.

    Raises:
        UnsupportedDataError: for iterable datasets, datasets of ready-made batches, subclasses with their own
            ``__iter__`` and loaders without examples.
    """
    _check_loader(loader)
    if type(loader.batch_sampler) is BatchSampler:
        indices, ordered = sampler_indices(loader.sampler, loader.dataset)
        size = loader.batch_sampler.batch_size
        plan = list(torch.split(indices, size)) if len(indices) else []
    else:
        plan, ordered = own_batches(loader), False
    if not plan:
        raise UnsupportedDataError(
            f"The loader over {type(loader.dataset).__name__} has no examples. Pass one that has some."
        )
    total = len(loader.dataset) if isinstance(loader.dataset, Sized) else None
    return IndexedLoader(plan, lambda part: rebuilt(loader, part), ordered=ordered, size=total)


def _check_loader(loader: DataLoader[Any]) -> None:
    name = type(loader.dataset).__name__
    if isinstance(loader.dataset, IterableDataset):
        raise UnsupportedDataError(
            f"{name} is an IterableDataset: its examples have no index to attribute to, and may come in "
            "another order each time. Give it __getitem__ and __len__, or pass list(loader) if it is small."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise UnsupportedDataError(
            f"{type(loader).__name__} overrides DataLoader.__iter__: its batches cannot be traced to {name}. "
            "Pass a plain DataLoader; what is done to batches can go into its collate_fn."
        )
    if loader.batch_sampler is None:
        raise UnsupportedDataError(
            f"DataLoader(batch_size=None): the items of {name} are batches, whose examples have no index of "
            "their own. Pass a dataset of single examples, or list(loader) to number them in order."
        )


def _are_loaders(items: Iterable[Any]) -> bool:
    items = list(items)
    return bool(items) and all(isinstance(item, DataLoader | IndexedLoader) for item in items)
