"""Which dataset examples the batches of a fit hold, from the indices that its sampler hands out.

Nothing of the user's is replaced: torch's iterator over a loader asks its sampler for the indices of a batch
in one method, and while a watch is open what that method returns is noted. With workers the sampler runs
ahead of the batches, which come back in its order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data import dataloader as torch_dataloader

from lightning_influence.support.errors import UnsupportedDataError

# Before the training loader is known, iterators of others (a validation before the fit) are noted as well.
_MOST_AHEAD = 100_000


class IndexWatch:
    """Notes the indices of batches between :meth:`open` and :meth:`close`."""

    # Weakly: a watch that nobody closes ends with the callback that opened it.
    _open: ClassVar[weakref.WeakSet[IndexWatch]] = weakref.WeakSet()
    _original: ClassVar[Callable[[Any], Any] | None] = None

    def __init__(self) -> None:
        self._drawn: weakref.WeakKeyDictionary[Any, _Drawn] = weakref.WeakKeyDictionary()
        self._sampler: Any = None

    def open(self) -> None:
        """Note what samplers hand out from here on."""
        if self in IndexWatch._open:
            return
        if IndexWatch._original is None:
            cls: Any = torch_dataloader._BaseDataLoaderIter
            original = IndexWatch._original = cls._next_index

            def next_index(iterator: Any) -> Any:
                index = original(iterator)
                for watch in tuple(IndexWatch._open):
                    watch._note(iterator, index)
                return index

            cls._next_index = next_index
        IndexWatch._open.add(self)

    def close(self) -> None:
        """Note no more, and forget what was noted."""
        IndexWatch._open.discard(self)
        if not IndexWatch._open and IndexWatch._original is not None:
            cls: Any = torch_dataloader._BaseDataLoaderIter
            cls._next_index, IndexWatch._original = IndexWatch._original, None
        self._drawn, self._sampler = weakref.WeakKeyDictionary(), None

    def read(self, trainer: Trainer) -> list[int]:
        """Return the dataset indices of the batch that the Trainer is about to train on.

        Raises:
            UnsupportedDataError: if they are not known.
        """
        fetcher: Any = trainer.fit_loop._data_fetcher
        iterators = fetcher.combined_loader._iterator.iterators
        iterator = iterators[0]
        self._sampler = getattr(iterator, "_index_sampler", None)
        drawn = self._drawn.get(iterator)
        if drawn is None:
            raise UnsupportedDataError(
                f"The indices of batches of {type(iterator).__name__} are not known. Accepted are torch's "
                "own DataLoader over a dataset with indices, and batches made of them."
            )
        # Without a length, Lightning fetches one batch ahead.
        number = iterator._num_yielded - 1 - len(getattr(fetcher, "batches", ()))
        return _to_integers(drawn.take(number))

    def _note(self, iterator: Any, index: Any) -> None:
        if self._sampler is not None and iterator._index_sampler is not self._sampler:
            return
        drawn = self._drawn.get(iterator)
        if drawn is None or drawn.source is not iterator._sampler_iter:  # workers that stay begin anew
            drawn = self._drawn[iterator] = _Drawn(iterator._sampler_iter)
        drawn.add(index)


class _Drawn:
    """What one pass of a sampler has handed out and nobody has read yet, by the number of the batch."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self._batches: dict[int, Any] = {}
        self._count = 0

    def add(self, index: Any) -> None:
        if len(self._batches) < _MOST_AHEAD:
            self._batches[self._count] = index
        self._count += 1

    def take(self, number: int) -> Any:
        found = self._batches.get(number)
        for old in [key for key in self._batches if key <= number]:
            del self._batches[old]
        return found


def count_dataset(trainer: Trainer) -> int:
    """Return how many examples the dataset of a fit's loader has.

    Raises:
        UnsupportedDataError: if there are several loaders, or the dataset has no length or no indices.
    """
    loader: Any = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise UnsupportedDataError(
            f"The training loader is a {type(loader).__name__}; accepted is one torch DataLoader."
        )
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UnsupportedDataError(
            f"{type(dataset).__name__} has no length or no indices; accepted are map-style datasets."
        )
    if loader.batch_sampler is None:
        raise UnsupportedDataError("The dataset makes its own batches, so their examples have no index.")
    return len(dataset)


def describe_collate(loader: Any) -> str | None:
    """Return what is assumed of a loader's own way to make batches, None for torch's, or without a loader."""
    if getattr(loader, "collate_fn", default_collate) is default_collate:
        return None
    return (
        "The loader has a collate_fn of its own, which is taken to keep the order of the examples in a batch."
    )


def _to_integers(index: Any) -> list[int]:
    """Return the indices of a batch as integers.

    Raises:
        UnsupportedDataError: if they are something else.
    """
    if isinstance(index, Tensor) and index.ndim == 1 and not index.is_floating_point():
        return [int(value) for value in index.tolist()]
    if type(index) is list and {*map(type, index)} == {int}:  # as samplers do: the loops below take longer
        return index[:]
    if isinstance(index, Sequence) and not isinstance(index, str):
        values = [value.item() if isinstance(value, Tensor) else value for value in index]
        if all(hasattr(value, "__index__") for value in values):
            return [int(value) for value in values]
    raise UnsupportedDataError(
        f"The sampler gave {type(index).__name__} for a batch; accepted are lists of dataset indices."
    )


def place_indices(indices: list[int], device: torch.device) -> Tensor:
    """Return indices as a tensor on a device."""
    return torch.tensor(indices, dtype=torch.long).to(device, non_blocking=True)
