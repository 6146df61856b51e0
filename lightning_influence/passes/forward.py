"""One forward pass of the user's module under capture: its loss, and gradients of every covered layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_influence.errors import LossCaptureError, NonFiniteError, UnsupportedModelError
from lightning_influence.layers import FactoredGradients, LayerPlan, Recorder
from lightning_influence.losses import LossCapture, OutputLoss, check_per_example, per_example_capture

Fisher = Literal["sampled", "exact", "empirical"]


class LossModule(Protocol):
    """What a pass needs of a module: a ``training_step`` or an ``influence_loss`` hook."""

    automatic_optimization: bool
    training_step: Callable[..., Any]


class Measure(Protocol):
    """A measurement on queries, as :class:`~lightning_influence.measurements.ResolvedMeasurement` is one."""

    @property
    def needs_loss(self) -> bool:
        """Whether the training loss has to run first."""
        ...

    def __call__(self, module: Any, batch: Any, *, loss: OutputLoss | None, batch_size: int) -> Tensor:
        """Values ``(B,)``, differentiable."""
        ...


@dataclass
class Captured:
    """A batch after its forward pass, ready for any number of backward passes.

    Attributes:
        num_examples: ``B``.
        loss: the captured loss, or None if only ``values`` are known.
        values: per-example losses ``(B,)`` from the module's ``influence_loss``, if it has one.
        recorder: the layers' inputs and graph.
    """

    num_examples: int
    loss: OutputLoss | None
    values: Tensor | None
    recorder: Recorder

    @property
    def weights(self) -> Tensor:
        """Weight of each example, ``(B,)``; their mean over the dataset normalises the loss."""
        if self.loss is not None:
            return self.loss.weights().detach()
        assert self.values is not None
        return torch.ones_like(self.values.detach())

    def per_example(self) -> Tensor:
        """Return unnormalised loss of each example, ``(B,)``, differentiable."""
        if self.loss is not None:
            return self.loss.per_example()
        assert self.values is not None
        return self.values

    def loss_gradients(self) -> dict[str, FactoredGradients]:
        """Return gradients of the per-example losses (before division by the mean weight), ``K = 1``."""
        if self.loss is None:
            return self.gradients_of(self.per_example())
        return self.recorder.gradients(self.loss.outputs, [self.loss.gradient()], self.num_examples)

    def gradients_of(self, values: Tensor) -> dict[str, FactoredGradients]:
        """Return gradients of any per-example values ``(B,)`` computed from this forward pass, ``K = 1``."""
        return self.recorder.gradients(values.sum(), [None], self.num_examples)

    def curvature_gradients(
        self, fisher: Fisher, generator: torch.Generator | None = None, draws: int = 1
    ) -> dict[str, FactoredGradients]:
        """Gradients whose outer products average to the Gauss-Newton matrix or an estimate of it.

        Args:
            fisher: ``"exact"`` for every column of the output curvature, ``"sampled"`` for labels drawn from
                the model, ``"empirical"`` for the training labels (biased).
            generator: source of the sampled labels.
            draws: number of sampled labels per example.

        Returns:
            Gradients with ``K`` seeds, before division by the square root of the mean weight. A module whose
            outputs are unknown (only ``influence_loss``) has the empirical ones.
        """
        if self.loss is None or fisher == "empirical":
            return self.loss_gradients()
        seeds: list[Tensor | None]
        if fisher == "exact":
            seeds = list(self.loss.columns())
        else:
            seeds = [self.loss.sample(generator) / draws**0.5 for _ in range(draws)]
        return self.recorder.gradients(self.loss.outputs, seeds, self.num_examples)


class Forward:
    """Runs batches through a module and captures what gradients need.

    Args:
        plan: the covered layers.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan
        self.silent: set[str] = set(plan.layers)
        self._checked = False

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
        if not self._checked:
            check_independent(captured)
            self._checked = num_examples > 1  # one example alone shows no coupling
        return captured

    def _run(
        self, recorder: Recorder, module: Any, batch: Any, num_examples: int, measure: Measure | None
    ) -> Captured:
        """Run the loss, the measurement on top of it, or the measurement alone.

        Returns:
            The captured batch; its values are those of the measurement if there is one.
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
            loss = capture.resolve(batch_loss, num_examples)
        captured = Captured(num_examples, loss, hooked, recorder)
        if measure is not None:
            values = measure(module, batch, loss=loss, batch_size=num_examples)
            captured = Captured(num_examples, None, values, recorder)
        return captured


def check_independent(captured: Captured) -> None:
    """Check a batch: finite losses, and an example's loss that depends on that example only.

    Raises:
        NonFiniteError: if a loss is NaN or infinite.
        UnsupportedModelError: if examples are coupled.
    """
    values = captured.per_example()
    if not bool(torch.isfinite(values).all()):
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"The loss of {len(bad)} of {captured.num_examples} examples in the first batch is not "
            f"finite (positions {bad[:5]}). Check these examples and the model's weights for NaN or "
            "infinity."
        )
    if captured.num_examples < 2:
        return
    coupled = _coupled(captured.recorder, values, captured.num_examples)
    if coupled is not None:
        raise UnsupportedModelError(
            f"The loss of one example depends on layer {coupled!r} at other examples of the batch. "
            "Accepted are models that treat examples independently in eval mode, with the examples in "
            "the first dimension and in the order of the batch. Put the batch first, move contrastive or "
            "in-batch terms out of the loss with `influence_loss`, or leave this layer out with "
            "`layers=`."
        )


def _coupled(recorder: Recorder, values: Tensor, num_examples: int) -> str | None:
    """Name a layer whose gradients at row ``b`` are not those of example ``b``'s loss alone.

    The first loss must leave all other rows alone. That does not see other examples trade places, so the
    losses are also weighed, each with a factor of its own, which must come back at the example's own row.

    Returns:
        The first such layer, or None.
    """
    index = torch.arange(num_examples, device=values.device, dtype=values.dtype)
    factors = 1 + (index * 0.618034).frac()
    first = recorder.backward(values[0], None, num_examples)
    plain = recorder.backward(values, torch.ones_like(factors), num_examples)
    weighed = recorder.backward(values, factors, num_examples)
    for name, grad in plain.items():
        expected = grad * factors.to(grad.dtype)[:, None, None]
        wrong = (weighed[name] - expected).norm() > 1e-2 * expected.norm()
        others = first[name][:, 1:].nan_to_num(0.0, 0.0, 0.0)  # not finite: refused elsewhere, as such
        if bool(wrong | others.any()):
            return name
    return None


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
    result = module.training_step(*_step_arguments(module, batch))
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
    return (batch, *(0 for _ in required))


def trainable(module: nn.Module) -> bool:
    """Return whether any parameter of the module requires a gradient."""
    return any(p.requires_grad for p in module.parameters())
