"""What a pass over data is, and what all ways to run one share.

A *pass* visits every example of one or several loaders once and hands each batch to :meth:`Pass.step`.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import Self

from lightning_influence.running.draws import Draws, FirstBatches
from lightning_influence.running.generators import preserve_generators
from lightning_influence.running.host.module import TrainingStage, preserved_states
from lightning_influence.running.host.processes import Meeting, raise_together, sum_over_processes
from lightning_influence.running.host.states import ModuleStates
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.reading import prepare
from lightning_influence.support.eager import eagerly
from lightning_influence.support.errors import InfluenceError
from lightning_influence.support.notes import Notes, listening
from lightning_influence.support.passes import Exchange
from lightning_influence.support.random_states import preserve_rng
from lightning_influence.support.turns import turn
from lightning_influence.support.waiting import reading_later


class Pass(Protocol):
    """What is done with every batch.

    Attributes:
        description: label of the progress bar, and name in the records.
    """

    description: str

    def step(self, module: LightningModule, batch: Any, indices: Tensor, dataloader_idx: int) -> None:
        """Take one batch.

        Args:
            module: the user's own module: in eval mode, gradients enabled, autocast off, logging muted.
            batch: the batch after the user's transfer hooks, on the module's device.
            indices: dataset indices of the batch's examples, shape ``(B,)``, int64, on the CPU.
            dataloader_idx: position of the loader among those of the pass.
        """


@dataclass(frozen=True)
class PassRecord:
    """What one pass took: seconds on this process, batches and examples summed over all processes."""

    name: str
    seconds: float
    batches: int
    examples: int


class Runner(ABC):
    """Common part of the runners: a context in which the module is borrowed, and the records of its passes.

    Attributes:
        module: the user's module.
        records: one :class:`PassRecord` for each finished pass.
        notes: what was left out or assumed, and every warning that is given while the module is borrowed.
        expected: how many passes there will be, about, of which the bar tells the number; None if unknown.
    """

    module: LightningModule

    def __init__(self) -> None:
        self.records: list[PassRecord] = []
        self.expected: int | None = None
        self._stack: contextlib.ExitStack | None = None
        self._meeting: Meeting | None = None
        self._firsts, self.notes = FirstBatches(), Notes()

    def __enter__(self) -> Self:
        """Return the runner with the module (and Trainer) borrowed; on failure everything is as before.

        Other threads wait until the block is left.

        Raises:
            InfluenceError: if the runner is in use already.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(turn())
            if self._stack is not None:
                raise InfluenceError(
                    "This runner is in use; leave its `with` block before entering it again."
                )
            self.notes = Notes()
            stack.enter_context(listening(self.notes.hear))
            self._borrow(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Give everything back."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.__exit__(kind, error, trace)

    def run(self, one_pass: Pass, dataloaders: Any) -> PassRecord:
        """Run a pass over loaders.

        Random states, generators that the loaders hold, buffers and metrics are the same after the pass as
        before it. What a batch draws, in its dataset and in its step, depends on these states and on its
        examples alone: every pass sees the same of it. Where it does not, that is warned of.

        Args:
            one_pass: what to do with each batch.
            dataloaders: anything that :func:`~.reading.prepare` reads, or its result.
                Hand in the result to several passes: workers that persist then persist between them.

        Returns:
            What the pass took; also appended to :attr:`records`.

        Raises:
            InfluenceError: if batches were left out, for instance because a step raised ``StopIteration``,
                or if another process has failed.
        """
        if self._stack is None:
            with self:
                return self.run(one_pass, dataloaders)
        loaders = prepare(dataloaders)
        expected = Expected()
        start = time.perf_counter()
        failure: Exception | None = None
        try:
            with (
                preserved_states(self.module) as states,
                preserve_rng(),
                preserve_generators(*(loader.source for loader in loaders)),
                eagerly(),
                reading_later(),
            ):
                done = Stepper(one_pass, self.module, states, Draws(self._firsts))
                if self._meeting is not None:
                    self._meeting.helper = getattr(one_pass, "help", None)
                self._run(done, loaders, expected)
            if (done.batches, done.examples) != (expected.batches, expected.examples):
                raise InfluenceError(
                    f"Pass {one_pass.description!r} ended after {done.examples} of {expected.examples} "
                    "examples. Look for a StopIteration that escapes from the model or the data."
                )
        except Exception as error:
            if not self._has_begun():
                raise  # the others are not where they could hear of it
            failure = error
        self.raise_together(failure)
        seconds = time.perf_counter() - start
        total = self.all_reduce_sum(torch.tensor([done.batches, done.examples]))
        record = PassRecord(one_pass.description, seconds, int(total[0]), int(total[1]))
        self.records.append(record)
        return record

    @property
    def shows_progress(self) -> bool:
        """Whether there is a progress bar on this process."""
        return False

    def label(self, one_pass: Pass) -> str:
        """Return the label of a pass: its description, and which of the expected ones it is."""
        number = len(self.records) + 1
        if self.expected is None or number > self.expected:
            return one_pass.description
        return f"{one_pass.description} ({number}/{self.expected})"

    @property
    def rank(self) -> int:
        """Number of this process."""
        return 0

    @property
    def world_size(self) -> int:
        """Number of processes that share a pass."""
        return 1

    @property
    def exchange(self) -> Exchange | None:
        """Lets processes that share parameters work together in mid-pass; None where each works alone."""
        return self._meeting if self.world_size > 1 else None

    @property
    def device(self) -> torch.device:
        """Where passes run."""
        return self.module.device

    def agree(self, loader: IndexedLoader) -> None:
        """Let all processes visit the first one's batches: a sampler may have drawn others elsewhere.

        Passes do so as well; what is decided by a loader's indices before the first pass has to wait for it.

        Args:
            loader: changed in place.
        """
        return  # there is one process

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, computed in place; on one process, the tensor."""
        if self.world_size == 1:
            return tensor
        self._meet()
        return sum_over_processes(tensor, self.device)

    def raise_together(self, error: Exception | None) -> None:
        """Raise an error on all processes if there is one on any; all of them have to call it.

        Args:
            error: of this process, None if all is well.

        Raises:
            Exception: this process's error.
            InfluenceError: another one's.
        """
        if self.world_size > 1 and self._meeting is None:
            raise_together(error)
        elif error is None:
            self._meet()
        elif self._meeting is None:
            raise error
        else:
            self._meeting.fail(error)

    def _meet(self) -> None:
        """Wait for the others, where processes ask each other for what they need in mid-pass."""
        if self._meeting is not None:
            self._meeting.wait()

    def _has_begun(self) -> bool:
        """Return whether all processes are on their way through the batches of a pass, or past it."""
        return True

    def all_gather_cat(self, tensor: Tensor) -> Tensor:
        """Return all processes' tensors joined along their first dimension, which may differ in length."""
        if self.world_size == 1:
            return tensor
        counts = torch.zeros(self.world_size, dtype=torch.int64)
        counts[dist.get_rank()] = len(tensor)
        sizes = self.all_reduce_sum(counts).tolist()
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]), device=self.device)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(tensor.device)

    @abstractmethod
    def _borrow(self, stack: contextlib.ExitStack) -> None:
        """Enter, on the stack, what has to be undone at the end."""

    @abstractmethod
    def _run(self, stepper: Stepper, loaders: list[IndexedLoader], expected: Expected) -> None:
        """Visit every batch of this process's share."""


class Stepper:
    """Hands batches to a pass as a fit would: gradients enabled, autocast off, the Trainer at training.

    A step that keeps a moving average of the weights, or clips them, would show later batches another model
    than the first; what it did to the weights is undone. Whether there is such a step is seen at the first
    batch, with one comparison.

    Args:
        one_pass: the pass.
        module: the user's module, borrowed.
        states: of the module, at the beginning of the pass.
        draws: gives every batch its own.

    Attributes:
        draws: the same.
        batches: how many were handed over.
        examples: how many they held.
    """

    def __init__(self, one_pass: Pass, module: LightningModule, states: ModuleStates, draws: Draws) -> None:
        self.one_pass, self.draws = one_pass, draws
        self.batches = self.examples = 0
        self._module, self._states, self._stage = module, states, TrainingStage(module)
        self._changes: bool | None = None

    def step(self, batch: Any, indices: Tensor, position: int) -> None:
        """Hand over one batch.

        Args:
            batch: the batch, on the module's device.
            indices: dataset indices ``(B,)``.
            position: of its loader among those of the pass.
        """
        self.draws.begin_step(indices)
        off = torch.autocast(self._module.device.type, enabled=False)
        with torch.enable_grad(), off, self._stage:
            self.one_pass.step(self._module, batch, indices, position)
        self.batches += 1
        self.examples += len(indices)
        if self._changes is None:
            self._changes = self._states.have_weights_changed()
        if self._changes:
            self._states.restore_weights()


@dataclass
class Expected:
    """How many batches and examples a process is going to visit; known when its loaders are."""

    batches: int = 0
    examples: int = 0
