"""What the batches of a pass draw: the same in every pass, and a warning where that cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_influence.running.loaders import IndexedLoader, Shard
from lightning_influence.support.batches import find_tensors
from lightning_influence.support.notes import warn
from lightning_influence.support.random_states import Seeds

# Chosen by hand: first batches that are kept to compare those of later passes with, and bytes of the largest.
_KEPT, _LARGEST = 8, 2**26

_OTHER_DRAWS = (
    "Examples of {name} come out otherwise each time that they are read: the first batch of one pass is "
    "another by {difference:.2g} (norm of the difference, relative) than before. Scores mix several draws. "
    "Accepted are datasets that draw from the global generators of torch, NumPy or Python, or from "
    "such generators that they hold, without persistent_workers=True; or turn what is random off."
)


class FirstBatches:
    """The first batches of passes, to tell whether the same examples come out as the same batch again."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, bytes], list[Tensor]] = {}

    def compare(self, loader: IndexedLoader, batch: Any, indices: Tensor) -> None:
        """Warn if a batch is not what a pass before has read of the same examples.

        Args:
            loader: that the batch is of.
            batch: before any hook.
            indices: of its examples, ``(B,)``.
        """
        source = loader.source
        if source is None:
            return
        # A loader may be rebuilt for every question part; what makes the examples is the same.
        key = (id(source.dataset), id(source.collate_fn), indices.numpy().tobytes())
        tensors = [tensor.detach() for tensor in find_tensors(batch) if tensor.layout == torch.strided]
        if key in self._kept:
            difference = _compare(self._kept[key], tensors)
            if difference:
                warn(_OTHER_DRAWS.format(name=type(source.dataset).__name__, difference=difference))
        elif len(self._kept) < _KEPT and sum(tensor.nbytes for tensor in tensors) <= _LARGEST:
            self._kept[key] = [tensor.clone() for tensor in tensors]


def _compare(kept: list[Tensor], tensors: list[Tensor]) -> float:
    """Return the norm of the difference of two batches, relative to the first; infinite for other shapes."""
    if [part.shape for part in kept] != [part.shape for part in tensors]:
        return float("inf")
    if all(map(torch.equal, kept, tensors)):
        return 0.0
    pairs = [(_to_numbers(one), _to_numbers(other)) for one, other in zip(kept, tensors, strict=True)]
    change = sum(float((one - other).square().sum()) for one, other in pairs)
    size = sum(float(one.square().sum()) for one, _ in pairs)
    return float((change / size) ** 0.5) if size else float(change > 0)


def _to_numbers(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().nan_to_num()


class Draws:
    """Seeds the global generators for every batch of a pass by its examples.

    What a batch draws depends on the user's states at the beginning of the pass and on which examples it has,
    and on nothing that others draw: not on how often a step is run, nor on how many batches come before.

    Args:
        firsts: first batches of passes before.
    """

    def __init__(self, firsts: FirstBatches) -> None:
        self._seeds, self._firsts = Seeds.draw(), firsts

    def read(self, loader: IndexedLoader, rank: int = 0, world_size: int = 1) -> SeededShard:
        """Return one process's share of a loader."""
        return SeededShard(self, loader, loader.shard(rank, world_size), self._firsts)

    def begin_reading(self, indices: Tensor) -> None:
        """Seed what a dataset and transfer hooks draw for examples ``(B,)``."""
        self._seeds.derive(b"data" + indices.numpy().tobytes()).apply()

    def begin_step(self, indices: Tensor) -> None:
        """Seed what a step draws for examples ``(B,)``."""
        self._seeds.derive(b"step" + indices.numpy().tobytes()).apply()


class SeededShard:
    """A share of a loader whose batches each have their own draws."""

    def __init__(self, draws: Draws, loader: IndexedLoader, shard: Shard, firsts: FirstBatches) -> None:
        self._draws, self._loader, self._shard, self._firsts = draws, loader, shard, firsts

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._shard)

    @property
    def num_examples(self) -> int:
        """Number of examples in this share."""
        return self._shard.num_examples

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield every batch with the dataset indices of its examples."""
        is_first = True
        for batch, indices in self._shard.read(self._draws.begin_reading):
            if is_first:
                self._firsts.compare(self._loader, batch, indices)
            is_first = False
            yield batch, indices
