"""Training dynamics of a callback's fits: what goes wrong in them ends neither a fit nor its collecting."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_influence.collecting.guard import Guard
from lightning_influence.collecting.moments import Moments
from lightning_influence.collecting.processes import CollectingError, Processes, describe_error
from lightning_influence.collecting.state import Kept, Settings
from lightning_influence.collecting.watching import Watching, start_watching
from lightning_influence.running.host.fit import read_loss_divisor
from lightning_influence.running.host.indices import IndexWatch, place_indices
from lightning_influence.support.notes import Notices


class FitDynamics:
    """Watches the steps of fits, one fit after the other, and stops at the first failure with a warning.

    What was kept until then is dropped, so that moments are never those of an unknown part of a run. Among
    several processes one that fails goes on meeting the others, and all stop where they next meet.

    Args:
        settings: of the callback.
        kept: has what earlier fits left, and what this one adds to it.
        say: gives warnings.
    """

    def __init__(self, settings: Settings, kept: Kept, say: Notices) -> None:
        self._settings, self._kept, self._say = settings, kept, say
        self._guard = Guard(self._handle)
        self._indices: IndexWatch | None = None  # while a fit runs
        self._watching: Watching | None = None

    def open(self) -> None:
        """Note indices from here on, before the first are drawn."""
        self.close()
        if self._settings.dynamics:
            with self._guard:
                self._indices = IndexWatch()
                self._indices.open()

    def start(self, trainer: Trainer, device: torch.device, processes: Processes) -> None:
        """Watch a fit, on every process or on none; every process has to call it."""
        if not self._settings.dynamics:
            return
        with self._guard:
            if self._indices is not None:
                share = self._settings.dynamics_share
                self._watching = start_watching(self._kept, trainer, device, processes, self._say, share)
        missing = self._watching is None
        if processes.share is not None:
            missing = bool(processes.share(torch.tensor([float(missing)])))
        if missing:
            self.close()

    def begin_epoch(self, epoch: int) -> None:
        """Let the losses of the epoch before enter the moments."""
        if self._watching is None or self._indices is None:
            return
        needs_indices = False
        with self._guard:
            needs_indices = self._watching.begin_epoch(epoch)
        with self._guard:
            if self._indices is not None:
                self._indices.open() if needs_indices else self._indices.close()

    def end_fit(self) -> None:
        """Let the losses of the last epoch enter the moments, and watch no longer."""
        with self._guard:
            if self._watching is not None:
                self._watching.end_epoch()
        with self._guard:
            if self._watching is not None:
                self._watching.tell()
        self.close()

    def begin_batch(self, trainer: Trainer, batch: Any) -> None:
        """Watch a step."""
        with self._guard:
            if self._watching is not None and self._indices is not None:
                self._watching.begin_batch(functools.partial(self._indices.read, trainer), batch)

    def take(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        """Read the step's losses before a backward pass."""
        with self._guard:
            if self._watching is not None:
                self._watching.take(
                    loss,
                    functools.partial(read_loss_divisor, trainer, module),
                    functools.partial(place_indices, device=loss.device),
                )

    def end_batch(self, backwards: int) -> None:
        """Add the step, which ran so many backward passes."""
        with self._guard:
            if self._watching is not None:
                self._watching.end_batch(backwards)

    def leave_batch(self) -> None:
        """Let go of a step that was begun and will not end."""
        with self._guard:
            if self._watching is not None:
                self._watching.leave_batch()

    def read(self) -> Moments | None:
        """Return moments up to the last step, in which the epoch that runs counts as over; None without."""
        with self._guard:
            if self._watching is not None:
                self._watching.flush()
        return self._kept.read_dynamics()

    def state_dict(self, *, together: bool = False) -> dict[str, Any] | None:
        """Return what is saved, None for nothing.

        Args:
            together: with the sums of all processes, which all have to call it for.
        """
        state, sums = None, None
        with self._guard:
            if self._watching is not None:
                if together:
                    sums = self._watching.sum_over_processes()
                else:
                    self._watching.flush()
        with self._guard:
            failed = self._watching is not None and self._watching.failure is not None
            if self._kept.dynamics is not None and not failed:
                state = self._kept.dynamics.state_dict(sums)
        return state

    def close(self) -> None:
        """Watch no longer, whatever the run has come to."""
        with self._guard:
            if self._watching is not None and self._watching.failure is None:
                self._watching.close()
        watching, self._watching = self._watching, None
        indices, self._indices = self._indices, None
        if watching is not None and watching.failure is not None:
            self._forget(watching.failure)
        with self._guard:
            if indices is not None:
                indices.close()

    def _handle(self, error: Exception) -> None:
        """Stop at whatever went wrong.

        Raises:
            Exception: the error, if the callback is strict.
        """
        reason = describe_error(error)
        shared = self._watching is not None and self._watching.is_shared
        if self._settings.strict or not shared or isinstance(error, CollectingError):
            self._stop(reason)
        elif self._watching is not None:
            self._watching.fail(reason)
        if self._settings.strict:
            raise error
        self._say(
            f"Training dynamics are not kept during this fit: {reason} Training and the collecting of "
            "factors go on as they are. dynamics=False asks for none.",
            "dynamics stopped",
        )

    def _stop(self, reason: str) -> None:
        """Watch nothing for the rest of this fit, and drop what was seen."""
        watching, self._watching = self._watching, None
        indices, self._indices = self._indices, None
        self._forget(reason)
        with contextlib.suppress(Exception):  # it may be what has failed
            if watching is not None:
                watching.leave_batch()
        with contextlib.suppress(Exception):
            if indices is not None:
                indices.close()

    def _forget(self, reason: str) -> None:
        self._kept.dynamics = Moments.start(0)  # for the reason
        self._kept.dynamics.note(reason)
