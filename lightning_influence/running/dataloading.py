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

from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
)

from lightning_influence.errors import UnsupportedDataError
from lightning_influence.host.attributes import combined_mode
from lightning_influence.running.loaders import ACCEPTED, IndexedLoader, ReadyMade, rebuilt
from lightning_influence.running.samplers import own_batches, sampler_indices


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
