"""Collecting that ends no training: what fails is told once, and leaves out a batch or stops collecting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from lightning_influence.collecting.collector import Collector
from lightning_influence.collecting.failures import CollectingError, contained
from lightning_influence.collecting.generations import Generations
from lightning_influence.collecting.store import Store
from lightning_influence.model.captured import Captured
from lightning_influence.model.live_capture import LiveCapture, check_first
from lightning_influence.support.errors import LossCaptureError, NonFiniteError, UnsupportedModelError
from lightning_influence.support.notes import Notices

Result = TypeVar("Result")


class Guarded:
    """What is collected during one fit after the other.

    Args:
        store: where it goes.
        say: gives warnings.

    Attributes:
        live: capture of this fit's steps, None if nothing is collected.
    """

    def __init__(self, store: Store, say: Notices) -> None:
        self._store, self._say = store, say
        self.live: LiveCapture | None = None

    @property
    def _collector(self) -> Collector:
        return self._store.collector

    def begin_batch(self) -> bool:
        """Return whether to collect the batch that begins."""
        try:
            return bool(self._together(self._collector.begin_batch))
        except NonFiniteError as error:
            self._say(str(error))
            return False

    def end_batch(self) -> None:
        """Stop after the first batch if it could not be collected on every process."""
        if self.live is not None:
            self._together(self._collector.end_batch)

    def collect(
        self,
        capture: Callable[[], Captured],
        module: nn.Module,
        *,
        around: contextlib.AbstractContextManager[None] | None = None,
        measure: bool = False,
    ) -> dict[str, float]:
        """Capture a batch and add it.

        Args:
            capture: returns the training step, its graph alive.
            module: the model.
            around: a context for all of it.
            measure: whether to return figures.

        Returns:
            Figures to log; empty without ``measure``, and where the batch was not collected.

        Raises:
            LossCaptureError: if the first batch's loss is not found.
            UnsupportedModelError: if the first batch's examples depend on each other.
        """
        first = not self._collector.resolved
        try:
            with (
                contained(LossCaptureError, NonFiniteError, UnsupportedModelError),
                around or contextlib.nullcontext(),
                torch.enable_grad(),
            ):
                return self._add(capture, module, first=first, measure=measure)
        except NonFiniteError as error:
            self._say(f"A batch was left out of the factors: {error}", "non-finite")
        except LossCaptureError as error:
            if first:
                raise
            self._say(f"A batch was left out of the factors: {error}", "loss")
        except CollectingError as error:
            self._fail(error)
        finally:
            self.close()
        return {}

    def _add(
        self, capture: Callable[[], Captured], module: nn.Module, *, first: bool, measure: bool
    ) -> dict[str, float]:
        with contained(LossCaptureError, NonFiniteError):
            captured = capture()
        if first:
            with contained():
                captured.recorder.inputs(captured.num_examples)  # names a layer whose rows are no examples
            with contained(NonFiniteError, UnsupportedModelError):
                check_first(captured, module)
        with contained(NonFiniteError):
            return self._collector.add(captured, module, measure=measure)

    @contextlib.contextmanager
    def contained(self) -> Iterator[None]:
        """Stop collecting at any error in here."""
        try:
            with contained():
                yield
        except CollectingError as error:
            self._fail(error)

    def summed(self) -> Generations | None:
        """Return the sums over several processes; None on one, and where nothing is collected."""
        if self.live is None or not self._collector.shared:
            return None
        return self._together(self._collector.summed)

    def close(self) -> None:
        """Remove all hooks, and let go of what they recorded."""
        if self.live is not None:
            self.live.close()
            self.live.clear()

    def stop(self, reason: str) -> None:
        """Collect nothing for the rest of this fit, and drop what was."""
        self.close()
        self._tell(reason)
        self.live = None
        self._store.reset()

    def interrupt(self) -> None:
        """End the fit at an error of somebody else's; what a failed process has is not kept."""
        if self._collector.failure is not None:
            self.stop(self._collector.failure)

    def _fail(self, error: CollectingError) -> None:
        """Stop, or among several processes tell them when they next come together."""
        self._collector.fail(error)
        if self._collector.shared:
            self._tell(str(error))
        else:
            self.stop(str(error))

    def _together(self, step: Callable[[], Result]) -> Result | None:
        """Return what all processes compute here, or None and stop if collecting failed on one of them."""
        try:
            return step()
        except CollectingError as error:
            self.stop(str(error))
            return None

    def _tell(self, reason: str) -> None:
        dropped = " What was collected before is dropped." if self._collector.collected else ""
        self._say(f"Nothing is collected during this fit: {reason}{dropped}")
