"""Training dynamics during one fit: from every step, the losses of its examples by their dataset indices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_influence.collecting.moments import Moments
from lightning_influence.collecting.pace import Pace
from lightning_influence.collecting.processes import CollectingError, Processes, describe_error
from lightning_influence.collecting.state import Kept
from lightning_influence.collecting.sums import AllReduce
from lightning_influence.model.live.example_losses import ExampleLosses, HeldStep, LossWatch
from lightning_influence.running.host.indices import count_dataset
from lightning_influence.support.errors import InfluenceError, LossCaptureError
from lightning_influence.support.notes import Notices

# Chosen by hand: small steps that are read at once. With 16 of them each operation is shared by as many.
_STEPS = 16
# Chosen by hand: a loss that was not seen in this many first batches will not be seen later either.
_TRIES = 3
# Chosen by hand: examples of which dynamics are kept unasked. They take 52 MB in every checkpoint.
_MOST_UNASKED = 1_000_000
SEVERAL = (
    "One training step ran several backward passes, and which of them is the training loss cannot be told."
)

_PACED = (
    "Some epochs were not watched, because they would have taken more than a fifth of the callback's "
    "overhead. InfluenceCallback(dynamics=True) watches all."
)

_ANOTHER_FIT = (
    "An earlier fit of the same weights, on as many examples, is continued; a new InfluenceCallback would "
    "have begun anew."
)

Made = TypeVar("Made")


class Watching:
    """Adds the steps of one fit to moments; a step that cannot be seen is counted as missed.

    Several processes meet once an epoch, when they add up their sums; one that has failed goes on meeting the
    others, and all stop there.

    Args:
        moments: what the fit continues.
        device: where the sums are kept.
        share: sums a tensor over the processes in place; None for one process.
        say: gives warnings.
        pace: chooses the epochs that are watched; all by default.

    Attributes:
        moments: the same.
        failure: why this process watches no longer and no moments are to be kept; None if all is well.
    """

    def __init__(
        self,
        moments: Moments,
        device: torch.device,
        share: AllReduce | None,
        say: Callable[[str, str], None],
        pace: Pace | None = None,
    ) -> None:
        self.moments = moments
        self.failure: str | None = None
        moments.sums = moments.sums.to(device)
        self._share, self._say = share, say
        self._pace = pace or Pace()
        self._losses = LossWatch()
        self._gone = False  # whether nothing more is watched, here or on another process
        self._indices: list[int] = []
        self._pending: HeldStep | ExampleLosses | None = None
        self._held: list[tuple[HeldStep, list[int]]] = []
        self._place: Callable[[list[int]], Tensor] | None = None
        self._reason: str | None = None
        self._seen = self._tried = 0

    @property
    def is_shared(self) -> bool:
        """Whether other processes watch along."""
        return self._share is not None

    def fail(self, reason: str) -> None:
        """Watch nothing more; the first reason is kept for the other processes."""
        self.failure = self.failure or reason
        self._gone, self._held = True, []
        self.leave_batch()

    def begin_epoch(self, epoch: int) -> bool:
        """Begin an epoch; the one before enters the moments, unless it is the same, after a resumption.

        Args:
            epoch: its number.

        Returns:
            Whether indices of its batches are needed.

        Raises:
            CollectingError: if watching has failed on any process.
        """
        try:
            if self.moments.epoch not in {-1, epoch}:
                self.end_epoch()
        finally:  # also where it has failed: processes meet at the ends of the same epochs
            self.moments.epoch = epoch
        return not (self._pace.rests or self._gone)

    def end_epoch(self) -> None:
        """Let the epoch enter the moments, of all processes together; every process has to call it.

        Raises:
            CollectingError: if watching has failed on any process.
        """
        with self._pace:
            self._prepare(self.flush)
            self._prepare(self._compare_values)
        sums = self.sum_over_processes()
        is_whole = self._pace.end_epoch(self._agree)
        with self._pace:
            if is_whole:
                self.moments.fold(sums)
            else:
                self.moments.skip(_PACED)

    def _agree(self, facts: list[bool]) -> list[bool]:
        """Return which of some facts hold on any process."""
        if self._share is None:
            return facts
        return [bool(value) for value in self._share(torch.tensor(facts, dtype=torch.float32))]

    def sum_over_processes(self) -> Tensor | None:
        """Return the epoch's sums over all processes, None for one; every process has to call it.

        Raises:
            CollectingError: if watching has failed on any process.
        """
        self._prepare(self.flush)
        if self._share is None:
            return None
        own = self._prepare(self.moments.sums.clone)
        if own is None or self.failure is not None:
            own = self.moments.sums  # which nobody needs any more
            own[-1, 3] = 1
        sums = self._share(own)
        if bool(sums[-1, 3]):
            raise CollectingError(
                self.failure or "They failed on another process, whose warning gives the reason."
            )
        return sums

    def _prepare(self, make: Callable[[], Made]) -> Made | None:
        """Return what is made; after a failure None, of which other processes hear when they next meet."""
        try:
            return make()
        except Exception as error:
            if self._share is None:
                raise
            self.fail(describe_error(error))
            return None

    def flush(self) -> None:
        """Let the steps that were held enter the sums; the moments are behind by those until then."""
        held, self._held = self._held, []
        for _, some in itertools.groupby(held, lambda pair: pair[0].kind):
            steps, indices = zip(*some, strict=True)
            try:
                found = self._losses.read_held(steps)
            except Exception as error:
                for _ in steps:
                    self.moments.miss(_first_line(error))
                continue
            assert self._place is not None
            places = self._place([index for own in indices for index in own])
            self.moments.add(places, found.losses, found.margins, batches=len(steps))

    def begin_batch(self, read_indices: Callable[[], list[int]], batch: Any) -> None:
        """Watch a step.

        Args:
            read_indices: returns the dataset indices of its examples.
            batch: what the step is given.
        """
        self.leave_batch()
        self._reason, self._indices = None, []
        if self._gone or self._pace.rests:
            return
        with self._pace:
            self._begin_batch(read_indices, batch)

    def _begin_batch(self, read_indices: Callable[[], list[int]], batch: Any) -> None:
        self._tried += 1
        try:
            self._indices = read_indices()
        except Exception as error:
            self._reason = _first_line(error)
            return
        if self._indices and min(self._indices) >= 0 and max(self._indices) < self.moments.size:
            self._losses.open(batch, len(self._indices))
        else:
            self._reason = f"A batch has no indices, or some outside 0 to {self.moments.size - 1}."

    def take(self, loss: Tensor, divisor: Callable[[], float], place: Callable[[list[int]], Tensor]) -> None:
        """Read the step's losses before its first backward pass.

        Args:
            loss: the scalar that is about to be differentiated.
            divisor: returns what the training loss was divided by to give it.
            place: makes a tensor of indices, on the loss's device.
        """
        if self._gone or not self._losses.is_open:
            return
        with self._pace:
            try:
                self._pending = self._losses.take(loss, len(self._indices), divisor())
                self._place = place
            except Exception as error:
                self._losses.close()
                self._reason = _first_line(error)

    def end_batch(self, backwards: int) -> None:
        """Add the step, or count it as missed.

        Args:
            backwards: how many backward passes it ran.
        """
        if self._gone:  # the others may go on, and the count of what they lack with them
            self.moments.sums[-1, 0] += 1
            return
        if self._pace.rests:
            return
        self._pace.count_met(self._losses.take_met())
        with self._pace:
            self._end_batch(backwards)
        if self._pace.gives_up():  # what was seen of the epoch is left out
            self._held = []
            self.moments.sums.zero_()

    def _end_batch(self, backwards: int) -> None:
        self._losses.close()
        if backwards > 1:
            self._pending, self._reason = None, SEVERAL
        if self._pending is not None:
            self._add(self._pending)
            self._pending = None
            self._seen += 1
        elif backwards or self._reason is not None:  # a step without a loss leaves nothing out
            self.moments.miss(self._reason or "The training loss was not seen.")
        if self._tried >= _TRIES and not self._seen and self._reason is not None:
            self._say(
                f"Training dynamics are not kept during this fit: {self._reason} Training goes on as it is. "
                "dynamics=False asks for none.",
                "dynamics",
            )
            self._gone = True

    def _add(self, found: HeldStep | ExampleLosses) -> None:
        if isinstance(found, HeldStep):
            self._held.append((found, self._indices))
            if len(self._held) == _STEPS:
                self.flush()
            return
        assert self._place is not None
        self.moments.add(self._place(self._indices), found.losses, found.margins)

    def leave_batch(self) -> None:
        """Let go of a step that was begun and will not end, as where the rest of an epoch is skipped."""
        self._losses.close()
        self._pending = None

    def close(self) -> None:
        """Watch no longer."""
        self.leave_batch()
        self.flush()

    def tell(self) -> None:
        """Say at the end of a fit what was missed."""
        moments = self.moments
        if moments.missed and not self._gone:
            self._say(
                f"Training dynamics lack {moments.missed} of {moments.missed + moments.batches} batches: "
                f"{moments.notes[-1] if moments.notes else 'their losses were not seen.'}",
                "dynamics",
            )

    def _compare_values(self) -> None:
        excess, self._losses.excess = self._losses.excess, None
        if excess is not None and float(excess) > 0:
            self._losses.distrust()
            self.moments.note(
                "In some epochs the training loss held another part than the loss function whose values were "
                "kept, such as a penalty that grows."
            )


def start_watching(
    kept: Kept,
    trainer: Trainer,
    device: torch.device,
    processes: Processes,
    say: Notices,
    share: float | None,
) -> Watching | None:
    """Begin to keep a fit's training dynamics, on every process or on none.

    Args:
        kept: has what earlier fits left, and what this one adds to it.
        trainer: whose fit it is.
        device: where the sums are kept.
        processes: of the fit.
        say: gives warnings.
        share: of the fit's time that they take at most where nobody has asked for them; then nothing is said
            where there can be none. None where somebody has.

    Returns:
        What watches; None where examples have no indices.
    """
    unasked = share is not None
    tell: Callable[[str, str], None] = _say_nothing if unasked else say
    reason: str | None = None
    try:
        size = count_dataset(trainer)
        if unasked and size > _MOST_UNASKED:
            reason = f"The dataset has more than {_MOST_UNASKED:,} examples, of which none are kept unasked."
    except InfluenceError as error:
        reason = str(error)
    if reason is not None:
        tell(
            f"Training dynamics are not kept during this fit: {reason} Training goes on as it is. "
            "dynamics=False asks for none.",
            "dynamics",
        )
        kept.dynamics = Moments.start(0)  # for the reason
        kept.dynamics.note(reason)
        return None
    if kept.dynamics is None or kept.dynamics.size != size:
        kept.dynamics = Moments.start(size)
    elif not kept.continued:
        kept.dynamics.note(_ANOTHER_FIT)
    elif processes.rank > 0:  # what was loaded are sums over all processes
        kept.dynamics.sums.zero_()
    return Watching(kept.dynamics, device, processes.share, tell, Pace(share))


def _say_nothing(message: str, kind: str) -> None:
    """Give no warning."""


def _first_line(error: Exception) -> str:
    text = error.reason if isinstance(error, LossCaptureError) else str(error)
    text = text.strip().partition("\n")[0]
    return text if isinstance(error, InfluenceError) else f"{type(error).__name__}: {text}"
