"""``InfluenceCallback``: collects factors, gradient statistics and the training record during ``fit``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_influence.collector import Collector, check_same_model
from lightning_influence.errors import (
    FactorMismatchError,
    InfluenceWarning,
    LossCaptureError,
    NonFiniteError,
)
from lightning_influence.factors.factors import Factors, fingerprint, fingerprint_differs
from lightning_influence.factors.generations import Generations
from lightning_influence.factors.training_record import TrainingRecord, effective_rate
from lightning_influence.gradient_statistics import gradient_norms
from lightning_influence.layers import LayerPlan, find_layers
from lightning_influence.passes.forward import Captured
from lightning_influence.passes.live import LiveCapture, batch_coupling, check_first
from lightning_influence.state import InfluenceState
from lightning_influence.training import (
    all_reduce,
    aside,
    batch_size_of,
    forward_context,
    loss_wrapping,
    planned_batches,
    why_not_collect,
)


class InfluenceCallback(Callback):
    """Collects what influence estimates need while the Trainer fits, for a few percent of its time.

    On some batches the layers' inputs and the gradients of the loss at labels drawn from the model are
    recorded on the user's own forward pass, before the user's backward pass; weights, gradients and random
    states of the training are untouched. Sums are kept over windows that double (see
    :mod:`~lightning_influence.factors.schedule`), so that recent factors exist whenever training ends. They
    are saved in every full checkpoint and continue when training is resumed from one.

    The sums are those of the training itself: dropout and augmentations are on, and BatchNorm uses the batch.

    Args:
        layers: names or shell patterns of the modules to cover; all supported ones if None.
        fisher: ``"sampled"`` for labels drawn from the model, ``"empirical"`` for the training labels.
        every_n_steps: collect every n-th batch; by default as many as ``overhead`` pays for.
        overhead: share of the training's operations that collecting may cost, eigendecompositions included.
        log_statistics: log figures of the curvature and the gradients under ``influence/``.
        seed: seed of the sampled labels; the global random state is never used.

    Attributes:
        extra_state: tensors and primitives that are saved and restored along.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        fisher: Literal["sampled", "empirical"] = "sampled",
        every_n_steps: int | None = None,
        overhead: float = 0.05,
        log_statistics: bool = True,
        seed: int = 0,
    ) -> None:
        if fisher not in {"sampled", "empirical"}:
            raise ValueError(f"Got fisher={fisher!r}; accepted during fit are 'sampled' and 'empirical'.")
        self._layers = None if layers is None else list(layers)
        self._fisher = fisher
        self._settings: dict[str, Any] = {
            "every_n_steps": every_n_steps,
            "overhead": overhead,
            "statistics": log_statistics,
            "seed": seed,
        }
        self._log_statistics = log_statistics
        self.extra_state: dict[str, Any] = {}
        self._collector = self._new_collector()
        self._fingerprint: dict[str, list[float]] = {}
        self._final: Generations | None = None
        self._kept: InfluenceState | None = None
        self._plan: LayerPlan | None = None
        self._live: LiveCapture | None = None
        self._backwards = 0
        self._figures: dict[str, float] | None = None
        self._last_logged: int | None = None
        self._said: set[str] = set()
        self._batch_size = 0
        self._from_backward = self._restored = False

    # What the rest of the library reads ---------------------------------------------------------------

    @property
    def factors(self) -> Factors:
        """The most recent complete sums, else covariances; without layers if there are none."""
        best = (self._final or self._collector.generations).best
        return replace(best, fingerprint=self._fingerprint, origin="fit")

    @property
    def record(self) -> TrainingRecord | None:
        """What the optimizer did, or None before its first step."""
        return self._collector.record if self._collector.record.steps else None

    @property
    def num_collected(self) -> int:
        """Number of batches collected so far."""
        return self._collector.collected

    @property
    def influence_state(self) -> InfluenceState:
        """What queries start from, and leave for later ones until training goes on."""
        if self._kept is None:
            factors = self.factors
            self._kept = InfluenceState(factors if factors.layers else None, self.record)
        return self._kept

    @influence_state.setter
    def influence_state(self, state: InfluenceState) -> None:
        self._kept = state

    # Start and end ------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The same for all settings that may change between a run and its continuation."""
        if self._layers is None and self._fisher == "sampled":
            return type(self).__name__
        return self._generate_state_key(layers=self._layers, fisher=self._fisher)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give a plain Trainer the methods ``influence`` and ``self_influence``."""
        from lightning_influence.trainer import attach  # it imports this module

        attach(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, and continue what was collected before if it belongs to these weights."""
        self._live = self._kept = self._final = None
        reason = why_not_collect(trainer)
        if reason is not None:
            self._refuse(reason)
            return
        self._plan = plan = find_layers(pl_module, self._layers)
        self._say(plan.describe_uncovered())
        self._say(_describe_coupling(pl_module))
        self._continue_or_reset(pl_module, plan)
        collector = self._collector
        collector.schedule.set_horizon(planned_batches(trainer, collector.schedule.steps))
        if self._restored and trainer.global_rank > 0:  # what was loaded are sums over all processes
            collector.generations = collector.generations.emptied()
        self._restored = False
        collector.generations = collector.generations.to(pl_module.device)
        collector.start(plan, trainer.global_rank, trainer.world_size, all_reduce(trainer))
        self._live = LiveCapture(plan)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the record, and sum over processes."""
        self._finish(trainer, pl_module)
        if self._live is not None and trainer.world_size > 1:
            self._final = self._collector.summed()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove all hooks."""
        self._finish(trainer, pl_module)

    # One batch ----------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this batch is collected, and put hooks in place."""
        self._figures, self._backwards = None, 0
        if self._live is None or not self._begins():
            return
        live, size = self._live, batch_size_of(batch)
        if not callable(getattr(pl_module, "influence_loss", None)):
            self._batch_size = size
            live.open()
            return
        with aside(trainer, pl_module):
            self._collect(trainer, pl_module, lambda: _run_hook(live, trainer, pl_module, batch, size))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Collect from the graph that the user's step has just built."""
        self._backwards += 1
        live = self._live
        if live is None:
            return
        if live.is_open:
            live.close()
            divisor, wrappers = loss_wrapping(trainer, pl_module)
            size = self._batch_size
            self._collect(
                trainer, pl_module, lambda: live.resolve(loss, size, divisor=divisor, wrappers=wrappers)
            )
            self._from_backward = True
        elif self._from_backward and self._backwards > 1:
            self._refuse(
                "One training step ran several backward passes (several losses, or a closure that is called "
                "again), and which of them is the training loss cannot be told. "
                "Define `influence_loss(batch) -> (B,)` on the module."
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the step to the training record, and measure the gradients on collected steps."""
        if self._live is None or self._plan is None:
            return
        self._collector.record.add_step(optimizer, self._plan.layers)
        if self._figures:
            group = optimizer.param_groups[0]
            self._figures.update(gradient_norms(pl_module, self._plan.layers))
            self._figures["effective_learning_rate"] = effective_rate(group)
            self._figures["weight_decay"] = float(group.get("weight_decay", 0.0))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and clean up after a step without a backward pass."""
        self._from_backward = False
        if self._live is not None and self._live.is_open:
            self._close()
            if not (pl_module.automatic_optimization or self._collector.resolved):
                self._refuse(
                    "The training step optimizes manually and did not call self.manual_backward(loss), so "
                    "its loss was not seen. Call that in place of loss.backward(), or define "
                    "`influence_loss(batch) -> (B,)` on the module."
                )
        if self._figures:
            self._last_logged = self._collector.schedule.steps
            figures = {f"influence/{name}": value for name, value in self._figures.items()}
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    # State --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives, which load with ``weights_only=True``."""
        return self._snapshot(self._final, self._fingerprint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was saved; the next fit continues it."""
        self._collector = self._new_collector()
        self._collector.load_state_dict(state_dict["collector"])
        self._fingerprint = dict(state_dict["fingerprint"])
        self.extra_state = dict(state_dict["extra_state"])
        self._final = self._kept = None
        self._restored = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Complete the saved state with what only the Trainer knows: all processes' sums, and the weights."""
        if self.state_key not in checkpoint.get("callbacks", {}):
            return
        self._read_metric(trainer)
        sums = self._final
        if sums is None and self._live is not None and trainer.world_size > 1:
            sums = self._collector.summed()
        checkpoint["callbacks"][self.state_key] = self._snapshot(sums, fingerprint(pl_module))

    # Private ------------------------------------------------------------------------------------------

    def _snapshot(self, sums: Generations | None, weights: dict[str, list[float]]) -> dict[str, Any]:
        collector = self._collector.state_dict(sums)
        return {"collector": collector, "fingerprint": weights, "extra_state": self.extra_state}

    def _new_collector(self) -> Collector:
        return Collector(self._fisher, **self._settings)

    def _begins(self) -> bool:
        try:
            return self._collector.begin_batch()
        except NonFiniteError as error:
            self._say(str(error))
            return False

    def _collect(self, trainer: Trainer, module: LightningModule, capture: Callable[[], Captured]) -> None:
        """Capture the batch and add it; the first one has to succeed, later ones are left out with a warning.

        Raises:
            LossCaptureError: if the first batch's loss is not found.
        """
        first, steps = not self._collector.resolved, self._collector.schedule.steps
        due = self._last_logged is None or steps - self._last_logged >= _log_every(trainer)
        try:
            with torch.enable_grad():
                captured = capture()
                if first:
                    check_first(captured, module)
                measure = self._log_statistics and bool(trainer.loggers) and due
                self._figures = self._collector.add(captured, module, measure=measure)
        except NonFiniteError as error:
            self._say(f"A batch was left out of the factors: {error}", "non-finite")
        except LossCaptureError as error:
            if first:
                raise
            self._say(f"A batch was left out of the factors: {error}", "loss")
        finally:
            self._close()

    def _continue_or_reset(self, module: LightningModule, plan: LayerPlan) -> None:
        """Drop what was collected for other layers or weights, and say so."""
        if not self._collector.schedule.steps:
            return
        try:
            check_same_model(self._collector.generations, plan)
            differ = fingerprint_differs(self._fingerprint, module)
            why = f"the weights differ from those at its end, in {differ[:3]}" if differ else ""
        except FactorMismatchError as error:
            why = str(error)
        if why:
            self._say(f"What was collected in an earlier fit is dropped: {why}")
            self._collector, self.extra_state = self._new_collector(), {}
        self._fingerprint = {}

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()
        self._kept = None
        if self._live is not None:
            self._read_metric(trainer)
            self._fingerprint = fingerprint(module)

    def _read_metric(self, trainer: Trainer) -> None:
        if self._plan is None:
            return
        for optimizer in trainer.optimizers:
            self._collector.record.read_metric(optimizer, self._plan.layers)

    def _close(self) -> None:
        if self._live is not None:
            self._live.close()
            self._live.clear()

    def _refuse(self, reason: str) -> None:
        """Stop collecting for the rest of this fit."""
        self._close()
        self._live = None
        self._collector = self._new_collector()
        self._say(f"Nothing is collected during this fit: {reason}")

    def _say(self, message: str | None, kind: str | None = None) -> None:
        """Warn, once for each kind of message."""
        if message is not None and (kind or message) not in self._said:
            self._said.add(kind or message)
            warnings.warn(message, InfluenceWarning, stacklevel=3)


def _run_hook(
    live: LiveCapture, trainer: Trainer, module: LightningModule, batch: Any, size: int
) -> Captured:
    with forward_context(trainer):
        return live.run_hook(module, batch, size)


def _log_every(trainer: Trainer) -> int:
    host: Any = trainer  # the attribute is declared nowhere
    return int(host.log_every_n_steps)


def _describe_coupling(module: LightningModule) -> str | None:
    names = batch_coupling(module)
    if not names:
        return None
    return (
        f"BatchNorm in training mode ({', '.join(names[:4])}) makes an example's gradient depend on the "
        "others of its batch, and factors from the fit include that. Ask with factors='refit' to fit them "
        "in eval mode."
    )
