"""Loaders for passes: every example once, in evaluation order, with its index in the dataset.

Training loaders shuffle, drop the last batch, draw with weights; attribution wants each example once. A
user's ``DataLoader`` is therefore read as *which examples, in what batches* and rebuilt as a plain sequential
one over the same dataset, with the same collate function, workers and memory settings:

* torch's own samplers: every index that the sampler can draw, ascending, in batches of ``batch_size``;
  ``drop_last`` does not apply, and a weighted sampler's examples of weight zero are left out;
* a sampler of the user's own: the distinct indices of one iteration over it, ascending;
* a batch sampler of the user's own: the batches of one iteration over it, in its order and without what it
  repeats, because only its batches may be ones that can be collated.

Indices are those of ``loader.dataset``, whatever that is: a ``Subset`` has its own numbering.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
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

from lightning_influence._lightning import combined_mode, wrapped_sampler
from lightning_influence.errors import InfluenceWarning, UnsupportedDataError

_ACCEPTED = (
    "a DataLoader over a map-style dataset, a list or dict of them, CombinedLoader(..., 'sequential'), "
    "or a list of ready-made batches"
)


class Shard:
    """One process's share of a loader: an iterable of ``(batch, indices)`` with a length.

    ``indices`` has shape ``(B,)``, int64, on the CPU. Iterating starts workers only when the first batch is
    asked for, and may be repeated.
    """

    def __init__(self, batches: Iterable[Any], indices: Sequence[Tensor]) -> None:
        self._batches = batches
        self._indices = indices

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._indices)

    @property
    def num_examples(self) -> int:
        """Number of examples in this share."""
        return sum(map(len, self._indices))

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield every batch with the dataset indices of its examples."""
        if self._indices:
            yield from zip(self._batches, self._indices, strict=True)


class IndexedLoader:
    """A loader that has been read: its examples' indices, and shares of its batches for each process.

    Attributes:
        ordered: whether the indices ascend and every process would find the same ones.
    """

    def __init__(
        self, plan: Sequence[Tensor], build: Callable[[Sequence[Tensor]], Iterable[Any]], *, ordered: bool
    ) -> None:
        self._plan = list(plan)
        self._build = build
        self.ordered = ordered
        self._shards: dict[tuple[int, int], Shard] = {}

    @property
    def indices(self) -> Tensor:
        """Dataset indices in the order of visiting, shape ``(N,)``, int64."""
        return torch.cat(self._plan)

    @property
    def num_examples(self) -> int:
        """``N``."""
        return sum(map(len, self._plan))

    def __len__(self) -> int:
        """Return the number of batches on one process."""
        return len(self._plan)

    def sample(self, count: int, seed: int = 0) -> IndexedLoader:
        """Return about ``count`` examples drawn at random, the same for the same seed.

        They are exactly ``count``, in ascending order, unless only the user's own batches can be collated: then whole
        batches are drawn until there are enough.
        """
        if count >= self.num_examples:
            return self
        generator = torch.Generator().manual_seed(seed)
        if self.ordered:
            chosen = torch.randperm(self.num_examples, generator=generator)[:count].sort().values
            return IndexedLoader(
                list(torch.split(self.indices[chosen], len(self._plan[0]))), self._build, ordered=True
            )
        plan: list[Tensor] = []
        for position in torch.randperm(len(self._plan), generator=generator).tolist():
            if sum(map(len, plan)) >= count:
                break
            plan.append(self._plan[position])
        return IndexedLoader(plan, self._build, ordered=False)

    def shard(self, rank: int = 0, world_size: int = 1) -> Shard:
        """Return every ``world_size``-th example (or batch, for ready-made ones), starting at ``rank``."""
        key = (rank, world_size)
        if key not in self._shards:
            plan = self._plan
            if world_size > 1 and self.ordered:
                share = self.indices[rank::world_size]
                plan = list(torch.split(share, len(self._plan[0]))) if len(share) else []
            elif world_size > 1:
                plan = plan[rank::world_size]
            self._shards[key] = Shard(self._build(plan), plan)
        return self._shards[key]

    def agree(self, broadcast: Callable[[list[Tensor]], list[Tensor]]) -> None:
        """Take over the first process's batches: a sampler of the user's may draw others on every process."""
        if not self.ordered:
            self._plan = broadcast(self._plan)
            self._shards.clear()


class _ReadyMade(IndexedLoader):
    """Batches without a dataset: examples are numbered in the order of the batches."""

    def __init__(self, batches: Sequence[Any]) -> None:
        sizes = [_batch_size(batch, position) for position, batch in enumerate(batches)]
        plan = list(torch.split(torch.arange(sum(sizes)), sizes))
        first = {int(part[0]): batch for part, batch in zip(plan, batches, strict=True)}
        super().__init__(plan, lambda part: [first[int(p[0])] for p in part], ordered=False)


def prepare(dataloaders: Any) -> list[IndexedLoader]:
    """Read one or several loaders, or ready-made batches.

    Args:
        dataloaders: a ``DataLoader``, a list or dict of them, a sequential ``CombinedLoader``, a list of
            batches, or what this function returned.

    Returns:
        One :class:`IndexedLoader` for each loader; a list of batches makes one.

    Raises:
        UnsupportedDataError: if a loader is empty or its examples have no index in a dataset.
        TypeError: if ``dataloaders`` is none of the accepted kinds.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> [loader] = prepare(DataLoader(range(5), batch_size=2, shuffle=True, drop_last=True))
        >>> [indices.tolist() for _, indices in loader.shard()]
        [[0, 1], [2, 3], [4]]
    """
    if isinstance(dataloaders, CombinedLoader):
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
        raise TypeError(f"Expected {_ACCEPTED}; got {type(dataloaders).__name__}.")
    if not dataloaders:
        raise UnsupportedDataError(f"The list of loaders is empty. Pass {_ACCEPTED}.")
    if _are_loaders(dataloaders):
        return [item if isinstance(item, IndexedLoader) else read_loader(item) for item in dataloaders]
    if any(isinstance(item, DataLoader | IndexedLoader) for item in dataloaders):
        kinds = sorted({type(item).__name__ for item in dataloaders})
        raise TypeError(f"The list mixes loaders with something else ({', '.join(kinds)}). Pass {_ACCEPTED}.")
    return [_ReadyMade(dataloaders)]


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
        indices, ordered = _sampler_indices(loader.sampler, loader.dataset)
        size = loader.batch_sampler.batch_size
        plan = list(torch.split(indices, size)) if len(indices) else []
    else:
        plan, ordered = _own_batches(loader), False
    if not plan:
        raise UnsupportedDataError(
            f"The loader over {type(loader.dataset).__name__} has no examples. Pass one that has some."
        )
    return IndexedLoader(plan, lambda part: _rebuilt(loader, part), ordered=ordered)


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


def _sampler_indices(sampler: Any, dataset: Any) -> tuple[Tensor, bool]:
    """Return the distinct indices that a sampler can draw, and whether every process finds the same."""
    inner = wrapped_sampler(sampler)
    if inner is not None:
        return _sampler_indices(inner, dataset)
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


def _own_batches(loader: DataLoader[Any]) -> list[Tensor]:
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
    with preserved_rng(), _preserved_generators(sampler, getattr(sampler, "sampler", None)):
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


def _batch_size(batch: Any, position: int) -> int:
    try:
        size = extract_batch_size(batch)
    except (MisconfigurationException, RecursionError):
        size = 0
    if size == 0:
        raise UnsupportedDataError(
            f"Batch {position} of the list ({type(batch).__name__}) holds no tensor with examples in its "
            f"first dimension. Pass {_ACCEPTED}."
        )
    return size


def _are_loaders(items: Iterable[Any]) -> bool:
    items = list(items)
    return bool(items) and all(isinstance(item, DataLoader | IndexedLoader) for item in items)


def _rebuilt(loader: DataLoader[Any], plan: Sequence[Tensor]) -> DataLoader[Any]:
    """Return the user's loader with these batches in place of its sampler's."""
    return DataLoader(
        loader.dataset,
        batch_sampler=_Lists(plan),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=cast(Any, loader.multiprocessing_context),
        prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
        persistent_workers=loader.persistent_workers,
    )


class _Lists:
    """Index batches as lists of ints, which is what datasets expect."""

    def __init__(self, plan: Sequence[Tensor]) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[list[int]]:
        return (part.tolist() for part in self._plan)

    def __len__(self) -> int:
        return len(self._plan)


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put the global random states (torch on CPU and CUDA, NumPy, Python) back on exit."""
    initialized: Callable[[], bool] = torch.cuda.is_initialized
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def _preserved_generators(*owners: object) -> Iterator[None]:
    found = [g for owner in owners if owner is not None for g in getattr(owner, "__dict__", {}).values()]
    saved = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in saved:
            generator.set_state(state)
