"""Loaders that have been read: batches with the indices of their examples, shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
)

from lightning_influence.running.collating import OrderedCollate
from lightning_influence.running.counting import ExampleCounter
from lightning_influence.support.batches import find_tensors, has_lists
from lightning_influence.support.errors import UnsupportedDataError


class Held:
    """An iterable of batches that reads its source once.

    Only batches made of tensors, numbers and texts are kept, because only of these is it known whether a step
    changed them in place; after one that did, and beyond the limit, they are read anew each time.

    Args:
        source: an iterable of batches that may be repeated.
        limit: most bytes to keep.
    """

    def __init__(self, source: Iterable[Any], limit: int) -> None:
        self._source, self._limit = source, limit
        self._kept: list[Any] | None = None
        self._versions: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        """Yield every batch."""
        if self._kept is not None and self._versions == _versions(self._kept):
            yield from self._kept
            return
        self._kept = None
        batches: list[Any] = []
        versions: list[int] = []
        free = self._limit
        for batch in self._source:
            tensors = _tensors(batch)
            free = free - sum(tensor.nbytes for tensor in tensors) if tensors is not None else -1
            if free >= 0:
                batches.append(batch)
                versions += [tensor._version for tensor in tensors or []]
            else:
                batches = []
            yield batch
        if free >= 0:
            self._kept, self._versions = batches, versions


def _versions(batches: list[Any]) -> list[int]:
    return [tensor._version for batch in batches for tensor in _tensors(batch) or []]


def _tensors(item: Any) -> list[Tensor] | None:
    """Return the tensors of a batch; None if it holds anything whose changes are not seen."""
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, int | float | str | bytes | None):
        return []
    if isinstance(item, Mapping):
        item = list(item.values())
    if not isinstance(item, list | tuple):
        return None
    found: list[Tensor] = []
    for part in item:
        tensors = _tensors(part)
        if tensors is None:
            return None
        found += tensors
    return found


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
        return self.read(lambda indices: None)

    def read(self, begin: Callable[[Tensor], None]) -> Iterator[tuple[Any, Tensor]]:
        """Yield every batch with the dataset indices of its examples.

        Args:
            begin: called with these before a batch is read; with the first also before workers are started.
        """
        if self._indices:
            begin(self._indices[0])
            batches = iter(self._batches)  # which draws a seed for workers
            for indices, batch in zip(self._begin_each(begin), batches, strict=True):
                _check_size(batch, len(indices))
                yield batch, indices

    def _begin_each(self, begin: Callable[[Tensor], None]) -> Iterator[Tensor]:
        for indices in self._indices:
            begin(indices)
            yield indices


def split_indices(indices: Tensor, size: int, least: int | None = None) -> list[Tensor]:
    """Split examples into batches without one of a single example, which not every training step runs on.

    Args:
        indices: of the examples.
        size: of a batch; a last example that would be alone joins or shortens the batch before it.
        least: examples of the smallest batch, if there are as many; 2 unless ``size`` is 1.

    Returns:
        The batches, at most ``size`` in each, or 3 if that is 2.
    """
    parts = list(torch.split(indices, size))
    least = min(2, size) if least is None else least
    if len(parts) > 1 and len(parts[-1]) < least:
        both = torch.cat([parts[-2], parts[-1]])
        parts[-2:] = [both[:-2], both[-2:]] if size > 2 else [both]
    return parts


class IndexedLoader:
    """A loader that has been read: its examples' indices, and shares of its batches for each process.

    Attributes:
        ordered: whether the indices ascend and every process would find the same ones.
        size: length of the dataset, of which the loader may draw a part; None for ready-made batches, and of
            a part of another loader.
        source: the user's loader, whose dataset and collate function make the batches; None for others.
        repeats: whether the user's batches hold examples that came before, of which these are without.
    """

    def __init__(
        self,
        plan: Sequence[Tensor],
        build: Callable[[Sequence[Tensor]], Iterable[Any]],
        *,
        ordered: bool,
        size: int | None = None,
        source: DataLoader[Any] | None = None,
        repeats: bool = False,
    ) -> None:
        self._plan = list(plan)
        self._build = build
        self.ordered, self.size, self.source, self.repeats = ordered, size, source, repeats
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

    @property
    def batches(self) -> list[Tensor]:
        """Dataset indices of each batch, ``(B,)``, in the order of visiting."""
        return list(self._plan)

    def in_batches(self) -> IndexedLoader:
        """Return the same loader, but one whose parts and shares are of whole batches, as ready-made ones."""
        return IndexedLoader(self._plan, self._build, ordered=False, size=self.size, repeats=self.repeats)

    def sample(self, count: int, seed: int = 0) -> IndexedLoader:
        """Return about ``count`` examples drawn at random, the same for the same seed.

        They are exactly ``count``, in ascending order, unless only the user's own batches can be
        collated: then whole batches are drawn until there are enough.
        """
        if count >= self.num_examples:
            return self
        generator = torch.Generator().manual_seed(seed)
        if self.ordered:
            chosen = torch.randperm(self.num_examples, generator=generator)[:count].sort().values
            return self._derive(split_indices(self.indices[chosen], len(self._plan[0])))
        drawn, examples = [], 0
        for position in torch.randperm(len(self._plan), generator=generator).tolist():
            if examples >= count:
                break
            drawn.append(position)
            examples += len(self._plan[position])
        return self._derive([self._plan[n] for n in sorted(drawn)])

    def only(self, indices: Tensor) -> IndexedLoader:
        """Return a loader of exactly these examples, which are among its own, ascending.

        Raises:
            ValueError: unless the loader is ordered: the user's own batches may not be collated otherwise.
        """
        if not self.ordered:
            raise ValueError("Only a loader in the library's own order can be cut to single examples.")
        return self._derive(split_indices(indices, len(self._plan[0])))

    def parts(self, count: int) -> list[IndexedLoader]:
        """Return loaders of at most ``count`` examples each, or two, in the order of visiting.

        Batches stay whole where only the user's own can be collated: a larger one is a part alone. No part
        is a single example, unless the user's batches are.
        """
        least = min(2, len(self._plan[0]))
        pieces = split_indices(self.indices, max(count, least), least) if self.ordered else self._plan
        plans: list[list[Tensor]] = []
        for piece in pieces:
            if not self.ordered and plans and sum(map(len, [*plans[-1], piece])) <= count:
                plans[-1].append(piece)
            else:
                plans.append(split_indices(piece, len(self._plan[0])) if self.ordered else [piece])
        return [self._derive(plan) for plan in plans]

    def holding(self, indices: Tensor) -> IndexedLoader:
        """Return a loader of these examples, or of the batches that hold them if it is not ordered.

        A single example comes with another one: not every training step runs on a batch of one.
        """
        if not self.ordered:
            return self.with_any(indices)
        own = self.indices
        if len(indices) == 1 and len(own) > 1 and len(self._plan[0]) > 1:
            other = own[own != indices[0]][:1]
            indices = torch.cat([indices, other])
        return self.only(indices.sort().values)

    def with_any(self, indices: Tensor) -> IndexedLoader:
        """Return a loader of the batches that hold any of these examples."""
        plan = [part for part in self._plan if bool(torch.isin(part, indices).any())]
        return self._derive(plan)

    def held(self, limit: int) -> IndexedLoader:
        """Return the same loader, but one that keeps its batches once read, up to a limit in bytes."""
        return self._derive(self._plan, lambda plan: Held(self._build(plan), limit))

    def _derive(
        self, plan: Sequence[Tensor], build: Callable[[Sequence[Tensor]], Iterable[Any]] | None = None
    ) -> IndexedLoader:
        """Return a loader of other batches of the same source."""
        return IndexedLoader(plan, build or self._build, ordered=self.ordered, source=self.source)

    def shard(self, rank: int = 0, world_size: int = 1) -> Shard:
        """Return every ``world_size``-th example (or batch, for ready-made ones), starting at ``rank``."""
        key = (rank, world_size)
        if key not in self._shards:
            plan = self._plan
            if world_size > 1 and self.ordered:
                share = self.indices[rank::world_size]
                plan = split_indices(share, len(self._plan[0])) if len(share) else []
            elif world_size > 1:
                plan = plan[rank::world_size]
            self._shards[key] = Shard(self._build(plan), plan)
        return self._shards[key]

    def agree(self, broadcast: Callable[[list[Tensor]], list[Tensor]]) -> None:
        """Take over the first process's batches: a sampler of the user's may draw others on every process."""
        if not self.ordered:
            self._plan = broadcast(self._plan)
            self._shards.clear()


class ReadyMade(IndexedLoader):
    """Batches without a dataset: examples are numbered in the order of the batches."""

    def __init__(self, batches: Sequence[Any]) -> None:
        counter = ExampleCounter()
        for batch in batches:
            counter.add(batch)
        sizes = counter.finish()
        batches = [counter.mark(batch, number) for number, batch in enumerate(batches)]
        plan = list(torch.split(torch.arange(sum(sizes)), sizes))
        first = {int(part[0]): batch for part, batch in zip(plan, batches, strict=True)}
        super().__init__(plan, lambda part: [first[int(p[0])] for p in part], ordered=False)


def _check_size(batch: Any, expected: int) -> None:
    """Refuse a batch whose tensors all hold fewer examples than were put into it.

    Raises:
        UnsupportedDataError: naming both numbers.
    """
    sizes = {len(tensor) for tensor in find_tensors(batch) if tensor.ndim}
    if len(sizes) == 1 and max(sizes) < expected and not has_lists(batch, expected):
        raise UnsupportedDataError(
            f"A batch made of {expected} examples has {max(sizes)}: its collate_fn (or dataset) leaves some "
            "out, and which ones cannot be told. Let it return all of them, and pass a loader over a "
            "torch.utils.data.Subset to leave examples out."
        )


def rebuilt(loader: DataLoader[Any], plan: Sequence[Tensor]) -> DataLoader[Any]:
    """Return the user's loader with these batches in place of its sampler's."""
    batches: Any = _Lists(plan)
    drawn = (
        {"batch_size": None, "sampler": batches}
        if loader.batch_sampler is None
        else {"batch_sampler": batches}
    )
    return DataLoader(
        loader.dataset,
        **drawn,
        num_workers=loader.num_workers,
        collate_fn=OrderedCollate(loader.collate_fn),
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
