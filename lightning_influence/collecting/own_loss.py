"""The loss that a user gave, ``loss=`` or ``influence_loss``, compared with that of the training step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lightning_influence.model.captured import Captured
from lightning_influence.model.checks import add_up_gradients
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.layers.recorder import Recorder
from lightning_influence.model.layers.use_recorder import Slopes
from lightning_influence.model.live.live_capture import LiveCapture, describe_other_loss
from lightning_influence.model.own_loss import check_direction, measure_cosine
from lightning_influence.support.errors import LossCaptureError, UnsupportedModelError


class OwnLoss:
    """Compares values on every collected batch, and gradients on the first, in the user's own graph.

    The gradients are those in the outputs of layers, of which those in their weights are made where the two
    losses call layers differently often: no hook on a parameter runs for them.

    Args:
        plan: the covered layers.
        name: of the user's loss, for messages.
        say: gives warnings.
    """

    def __init__(self, plan: LayerPlan, name: str, say: Callable[[str | None, str], None]) -> None:
        self._name, self._say = name, say
        self._live = LiveCapture(plan)
        self._is_new = True  # whether gradients have not been compared yet
        # Of the batch that runs.
        self._values: Tensor | None = None
        self._gradients: tuple[Mapping[str, Slopes], ...] = ()
        self._drawn = False
        self._cosine: float | None = None

    def note(self, captured: Captured, *, drawn: bool) -> None:
        """Keep what a batch's step is compared with.

        Args:
            captured: the user's loss on the batch.
            drawn: whether random numbers were drawn for it, which the step may use in another order.
        """
        self._values = None if captured.values is None else captured.values.detach()
        if self._is_new:
            self._drawn = drawn
            with contextlib.suppress(Exception):  # what cannot be differentiated is told of elsewhere
                self._gradients = _read_gradients(captured.recorder, captured.total(), captured.num_examples)

    def open(self, module: nn.Module) -> None:
        """Watch the step, if its gradients are to be compared."""
        if self._gradients:
            self._live.open(module)

    @property
    def is_open(self) -> bool:
        """Whether a step is being watched."""
        return self._live.is_open

    def compare_values(self, loss: Tensor) -> None:
        """Say where the values do not make up the loss of the step, in the units of the training loss."""
        if self._values is not None:
            self._say(describe_other_loss(self._values, loss.detach(), self._name), "other loss")

    def compare_gradients(self, loss: Tensor, num_examples: int) -> None:
        """Compare gradients before the step's backward pass; nothing is concluded where there are none."""
        self._live.close()
        ours, self._gradients, self._is_new = self._gradients, (), False
        with contextlib.suppress(Exception):  # the graph may refuse to be differentiated twice
            theirs = _read_gradients(self._live.read_recorder(), loss, num_examples)
            cosines = (measure_cosine(own, other) for own, other in zip(ours, theirs, strict=True))
            self._cosine = next((cosine for cosine in cosines if cosine is not None), None)
        self._live.clear()

    def judge(self, backwards: int) -> None:
        """Refuse a loss that goes against the step's, after a step that ran so many backward passes.

        Raises:
            UnsupportedModelError: if it does. Of several passes it is not known which is the training's.
        """
        cosine, self._cosine = self._cosine, None
        if backwards == 1:
            try:
                check_direction(cosine, self._name, drawn=self._drawn)
            except LossCaptureError as error:  # which of a later batch would leave out that batch alone
                raise UnsupportedModelError(str(error)) from error

    def close(self) -> None:
        """Let go of the batch."""
        self._live.close()
        self._live.clear()
        self._values, self._gradients, self._cosine = None, (), None


def _read_gradients(recorder: Recorder, loss: Tensor, num_examples: int) -> tuple[Mapping[str, Slopes], ...]:
    """Return the gradients of a scalar in the outputs of layers, and those in their weights."""
    slopes = recorder.backward(loss, None, num_examples)
    return slopes, add_up_gradients(recorder, slopes, num_examples)
