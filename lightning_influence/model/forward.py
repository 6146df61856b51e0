"""One forward pass of the user's module under capture."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_influence.model.captured import Captured
from lightning_influence.model.checks import check_independent, check_loss, check_order, missing_positions
from lightning_influence.model.losses.capture import LossCapture
from lightning_influence.model.losses.hook import check_per_example, per_example_capture
from lightning_influence.model.losses.loss import OutputLoss
from lightning_influence.model.plan import LayerPlan
from lightning_influence.model.recorder import Recorder
from lightning_influence.support.errors import (
    LossCaptureError,
    NonFiniteError,
    UnsupportedModelError,
    add_note,
)

_OUTSIDE_FIT = (
    "This was raised by the module's `training_step`, which influence runs on training and query batches, in "
    "eval mode and outside of a fit. If it needs what only a fit has (optimizers, a logger), or query "
    "batches are of another form, define `influence_loss(batch) -> (B,)` on the module: the loss of each "
    "example of the batch."
)


class Measure(Protocol):
    """A measurement on queries, such as a ``ResolvedMeasurement``."""

    @property
    def needs_loss(self) -> bool:
        """Whether the training loss has to run first."""
        ...

    def __call__(self, module: Any, batch: Any, *, loss: OutputLoss | None, batch_size: int) -> Tensor:
        """Values ``(B,)``, differentiable."""
        ...


class Forward:
    """Runs batches through a module and captures what gradients need.

    Args:
        plan: the covered layers.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan
        self.silent: set[str] = set(plan.layers)

    def __call__(
        self, module: Any, batch: Any, num_examples: int, measure: Measure | None = None
    ) -> Captured:
        """Forward one batch with gradients enabled.

        Args:
            module: the user's LightningModule.
            batch: a batch, on the module's device.
            num_examples: ``B``.
            measure: what to measure in place of the loss; if it needs no loss, it is all that runs.

        Returns:
            The captured batch.

        Raises:
            LossCaptureError: if the loss is not found or not reproduced.
            NonFiniteError: if a loss is NaN or infinite.
            UnsupportedModelError: if the model cannot be differentiated example by example.
        """
        recorder = Recorder(self.plan.layers)
        with recorder:
            captured = self._run(recorder, module, batch, num_examples, measure)
        self.silent &= set(recorder.silent)
        if len(recorder.silent) == len(self.plan.layers):
            raise UnsupportedModelError(
                "No covered layer took part in the forward pass with a gradient graph. Accepted are layers "
                "that are called as modules, outside torch.no_grad() and outside gradient checkpointing. "
                f"Layers: {sorted(self.plan.layers)[:8]}."
            )
        subject = "loss" if measure is None else "measurement"
        if subject not in self.plan.verified:
            check_independent(captured)
            if num_examples > 1:  # one example alone shows no coupling
                self.plan.verified.add(subject)
        if measure is None and num_examples > 1:
            self._check_order(captured, module, batch)
        return captured

    def _run(
        self, recorder: Recorder, module: Any, batch: Any, num_examples: int, measure: Measure | None
    ) -> Captured:
        """Run the loss, the measurement on top of it, or the measurement alone.

        Returns:
            The captured batch; its values are those of the measurement if there is one.

        Raises:
            NonFiniteError: if the loss is NaN or infinite; says where that began.
        """
        if measure is not None and not measure.needs_loss:
            values = measure(module, batch, loss=None, batch_size=num_examples)
            return Captured(num_examples, None, values, recorder)
        with LossCapture() as capture:
            hooked, batch_loss = _call(module, batch)
        if hooked is not None:
            check_per_example(hooked, num_examples, "influence_loss(batch)")
            loss = per_example_capture(hooked, capture, num_examples)
        else:
            assert batch_loss is not None
            try:
                loss = capture.resolve(batch_loss, num_examples)
            except NonFiniteError:
                check_loss(batch_loss.detach(), recorder, self.plan.layers)  # says where that began
                raise
        captured = Captured(num_examples, loss, hooked, recorder)
        if measure is not None:
            values = measure(module, batch, loss=loss, batch_size=num_examples)
            captured = Captured(num_examples, None, values, recorder)
        return captured

    def _check_order(self, captured: Captured, module: Any, batch: Any) -> None:
        """Check that the losses come in the order of the examples, for each way in which their rows do."""
        values = captured.per_example()
        outputs = values if captured.loss is None else captured.loss.outputs
        subject = f"order {missing_positions(batch, captured.num_examples, len(outputs))}"
        if subject not in self.plan.verified:
            check_order(values, batch, partial(compute_losses, module), outputs.dtype)
            self.plan.verified.add(subject)


def compute_losses(module: Any, batch: Any, num_examples: int) -> Tensor:
    """Forward one batch for the losses of its examples alone, which are not differentiated.

    Args:
        module: the user's LightningModule, checked on such batches by :class:`Forward` before.
        batch: a batch, on the module's device.
        num_examples: ``B``.

    Returns:
        Unnormalised losses, ``(B,)``.

    Raises:
        LossCaptureError: if the loss is not found or not reproduced.
        NonFiniteError: if the batch's loss is NaN or infinite.
    """
    # The graph need not hold activations.
    dropped = torch.autograd.graph.saved_tensors_hooks(lambda t: t.new_empty(0), lambda t: t)
    with dropped, LossCapture() as capture:
        hooked, batch_loss = _call(module, batch)
    if batch_loss is None:
        assert hooked is not None
        return hooked.detach()
    return capture.resolve(batch_loss, num_examples).per_example().detach()


def _call(module: Any, batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Run the hook ``influence_loss`` if there is one, else ``training_step``.

    Returns:
        ``(per-example values, None)`` from the hook, or ``(None, batch loss)``.

    Raises:
        LossCaptureError: if ``training_step`` returns no loss.
        UnsupportedModelError: if the module optimizes manually.
    """
    hook = getattr(module, "influence_loss", None)
    if callable(hook):
        return hook(batch), None
    if not getattr(module, "automatic_optimization", True):
        raise UnsupportedModelError(
            "The module optimizes manually, so its `training_step` cannot be run without changing the "
            "weights. Define `influence_loss(self, batch)`, which returns the per-example training loss as a "
            "tensor of shape (B,)."
        )
    arguments = _step_arguments(module, batch)
    try:
        result = module.training_step(*arguments)
    except Exception as error:
        add_note(error, _OUTSIDE_FIT)
        raise
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor):
        raise LossCaptureError(
            f"`training_step` returned {type(result).__name__} without a loss tensor; accepted are a scalar "
            "tensor or a dict with the key 'loss'. If it skips batches, define `influence_loss(batch) -> "
            "(B,)` on the module."
        )
    return None, loss


def _step_arguments(module: Any, batch: Any) -> tuple[Any, ...]:
    """Collect positional arguments of ``training_step``: the batch, and 0 for every further required one.

    Returns:
        The arguments.

    Raises:
        UnsupportedModelError: if the step takes an iterator.
    """
    parameters = list(inspect.signature(module.training_step).parameters.values())
    if parameters and parameters[0].name == "dataloader_iter":
        raise UnsupportedModelError(
            "`training_step(dataloader_iter)` draws its own batches; influence passes need "
            "`training_step(batch, ...)` or the hook `influence_loss(batch) -> (B,)`."
        )
    required = [
        p
        for p in parameters[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    # Lightning gives the batch's number to `training_step(self, *args)` as well.
    variadic = bool(parameters) and parameters[0].kind is parameters[0].VAR_POSITIONAL
    return (batch, *(0 for _ in required), *((0,) if variadic else ()))
