"""Batches without indices: they are numbered in the order in which they come, which is checked each time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.running.counting import ExampleCounter
from lightning_influence.running.generators import preserve_generators
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.support.batches import find_tensors
from lightning_influence.support.digests import digest_tensors
from lightning_influence.support.errors import UnsupportedDataError
from lightning_influence.support.notes import warn
from lightning_influence.support.random_states import RandomStates

_OTHER = (
    "Batch {number} of {name} is another one than when it was first read, or does not come. Accepted are "
    "loaders that give the same batches in the same order each time: turn shuffling off, or pass "
    "list(loader) if it is small."
)


class Stream(IndexedLoader):
    """Batches of an iterable without indices: examples are numbered in the order in which they come.

    The iterable is read once to count them. Every later reading has the random states of the first, and each
    batch has to be the same as then.

    Args:
        source: an iterable of batches that may be repeated.
        name: of the source, for messages.

    Raises:
        UnsupportedDataError: if a batch holds no examples.
    """

    def __init__(self, source: Iterable[Any], name: str) -> None:
        self._source, self._name, self._states = source, name, RandomStates.read()
        self._counter = ExampleCounter()
        self._digests: list[str] = []
        for batch in self._read():
            self._counter.add(batch)
            self._digests.append(_digest(batch))
        sizes = self._counter.finish()
        plan = list(torch.split(torch.arange(sum(sizes)), sizes)) if sizes else []
        self._numbers = {int(part[0]): number for number, part in enumerate(plan)}
        super().__init__(plan, lambda some: _Selected(self, some), ordered=False)
        warn(
            f"The examples of {name} have no index of their own: they are numbered in the order in which "
            "they come, which has to be the same each time."
        )

    def select(self, plan: Sequence[Tensor]) -> Iterator[Any]:
        """Yield the batches of a plan in the order in which they come.

        Raises:
            UnsupportedDataError: if a batch is another one than at first.
        """
        wanted = {self._numbers[int(part[0])] for part in plan}
        assert sorted(wanted) == [self._numbers[int(part[0])] for part in plan]  # as batches come
        for number, batch in enumerate(self._read()):
            if not wanted:
                return
            if number not in wanted:
                continue
            if _digest(batch) != self._digests[number]:
                raise UnsupportedDataError(_OTHER.format(number=number, name=self._name))
            wanted.discard(number)
            yield self._counter.mark(batch, number)
        if wanted:
            raise UnsupportedDataError(_OTHER.format(number=min(wanted), name=self._name))

    def _read(self) -> Iterator[Any]:
        """Yield all batches, drawn with the random states of the first reading, which nobody else moves."""
        inside, outside = self._states, RandomStates.read()
        with preserve_generators(self._source):
            inside.write()
            try:
                for batch in itertools.islice(self._source, self._find_length()):
                    inside = RandomStates.read()
                    outside.write()
                    yield batch
                    outside = RandomStates.read()
                    inside.write()
            finally:
                outside.write()

    def _find_length(self) -> int | None:
        """Return how many batches the source says it has: Lightning asks for no more, and there may be."""
        try:
            return len(self._source)  # type: ignore[arg-type]
        except TypeError:
            return None


class _Selected:
    def __init__(self, stream: Stream, plan: Sequence[Tensor]) -> None:
        self._stream, self._plan = stream, plan

    def __iter__(self) -> Iterator[Any]:
        return self._stream.select(self._plan)


def _digest(batch: Any) -> str:
    """Return a text that changes with a batch's tensors."""
    tensors = [tensor for tensor in find_tensors(batch) if tensor.layout == torch.strided]
    return digest_tensors({str(number): tensor for number, tensor in enumerate(tensors)})
