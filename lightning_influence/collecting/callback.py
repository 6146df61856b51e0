"""``InfluenceCallback``: collects factors, gradient statistics and the training record during ``fit``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_influence.collecting.collector import Collector, FitFisher
from lightning_influence.collecting.figures import Figures
from lightning_influence.collecting.generations import Generations
from lightning_influence.collecting.guarded import Guarded
from lightning_influence.collecting.settings import Settings
from lightning_influence.collecting.store import Store
from lightning_influence.curvature.factors import Factors, fingerprint
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.model.captured import Captured
from lightning_influence.model.live_capture import LiveCapture, describe_coupling
from lightning_influence.model.plan import LayerPlan, find_layers
from lightning_influence.running.host.fit import (
    LOSS_NOT_SEEN,
    SEVERAL_BACKWARDS,
    all_reduce,
    aside,
    batch_size_of,
    forward_context,
    log_every,
    loss_wrapping,
    planned_batches,
    why_not_collect,
)
from lightning_influence.running.host.trainer import attach_methods
from lightning_influence.support.notes import Notices


class InfluenceCallback(Callback):
    """Collects what influence estimates need while the Trainer fits, for a few percent of its time.

    On some batches the layers' inputs and gradients whose outer products average to the Gauss-Newton
    matrix are recorded on the user's own forward pass, before the user's backward pass; weights, gradients
    and random states of the training are untouched. Sums are kept over windows that double, so that recent
    factors exist whenever training ends. They are saved in every full checkpoint and continue when training
    is resumed from one. A checkpoint that is saved after a question was asked also holds what the answer was
    computed from and later ones can use (the coarse space of two-level EK-FAC, factors from a pass), each
    unless it takes more than 256 MiB.

    A fit that cannot be collected goes on as without the callback: a warning gives the reason, and whatever
    was collected until then is dropped, so that factors are never those of an unknown part of a run. Errors
    are raised only before anything is trained: for a model without a covered layer, and at the first batch
    for a loss that is not found or examples that depend on each other.

    The sums are those of the training itself: dropout and augmentations are on, and BatchNorm uses the batch.

    Args:
        layers: names or shell patterns of the modules to cover; all supported ones if None.
        fisher: ``"mixed"`` for random mixtures of the columns of the loss's curvature in the outputs, which
            are right on average and vary least; ``"sampled"`` for labels drawn from the model;
            ``"empirical"`` for the training labels.
        every_n_steps: collect every n-th batch; by default as many as ``overhead`` pays for.
        overhead: share of the training's operations that collecting may cost, eigendecompositions included.
        log_statistics: log figures of the curvature and the gradients under ``influence/``.
        seed: seed of the draws; the global random state is never used.

    Raises:
        TypeError: if ``layers`` is no list of texts.
        ValueError: if another setting is out of range.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        fisher: FitFisher = "mixed",
        every_n_steps: int | None = None,
        overhead: float = 0.05,
        log_statistics: bool = True,
        seed: int = 0,
    ) -> None:
        settings = Settings(layers, fisher, every_n_steps, overhead, seed)
        self._layers, self._fisher = settings.layers, settings.fisher
        self._store = Store(
            settings.fisher,
            every_n_steps=settings.every_n_steps,
            overhead=settings.overhead,
            statistics=log_statistics,
            seed=settings.seed,
        )
        self._plan: LayerPlan | None = None
        self._backwards = 0
        self._figures = Figures(log_statistics)
        self._say = Notices()
        self._guarded = Guarded(self._store, self._say)
        self._batch_size = 0
        self._from_backward = False

    @property
    def factors(self) -> Factors:
        """The most recent complete sums, else covariances; without layers if there are none."""
        return self._store.factors

    @property
    def record(self) -> TrainingRecord | None:
        """What the optimizer did, or None before its first step."""
        return self._store.record

    @property
    def num_collected(self) -> int:
        """Number of batches collected so far."""
        return self._collector.collected

    @property
    def extra_state(self) -> dict[str, Any]:
        """Tensors and primitives that are saved and restored along."""
        return self._store.extra_state

    @property
    def influence_state(self) -> InfluenceState:
        """What queries start from, and leave for later ones until training goes on."""
        return self._store.influence_state

    @influence_state.setter
    def influence_state(self, state: InfluenceState) -> None:
        self._store.influence_state = state

    @property
    def _collector(self) -> Collector:
        return self._store.collector

    @property
    def _live(self) -> LiveCapture | None:
        return self._guarded.live

    @property
    def state_key(self) -> str:
        """The same for all settings that may change between a run and its continuation."""
        if self._layers is None and self._fisher == "mixed":
            return type(self).__name__
        return self._generate_state_key(layers=self._layers, fisher=self._fisher)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give a plain Trainer the methods ``influence`` and ``self_influence``."""
        attach_methods(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, and continue what was collected before if it belongs to these weights."""
        self._guarded.live = None
        self._store.begin_fit()
        reason = why_not_collect(trainer)
        if reason is not None:
            self._guarded.stop(reason)
            return
        self._plan = plan = find_layers(pl_module, self._layers)
        self._say(plan.describe_uncovered())
        self._say(describe_coupling(pl_module))
        why = self._store.continue_or_reset(pl_module, plan)
        self._say(why and f"What was collected in an earlier fit is dropped: {why}")
        collector = self._collector
        collector.schedule.set_horizon(planned_batches(trainer, collector.schedule.steps))
        if self._store.restored and trainer.global_rank > 0:  # what was loaded are sums over all processes
            collector.generations = collector.generations.emptied()
        self._store.restored = False
        collector.generations = collector.generations.to(pl_module.device)
        collector.start(plan, trainer.global_rank, trainer.world_size, all_reduce(trainer))
        self._guarded.live = LiveCapture(plan)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the record, and sum over processes."""
        final = self._summed(trainer)
        self._finish(trainer, pl_module)
        self._store.final = final

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove all hooks."""
        self._guarded.interrupt()
        self._finish(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this batch is collected, and put hooks in place."""
        self._figures.clear()
        self._backwards = 0
        live = self._live
        if live is None or not self._begins(batch):
            return
        size = self._batch_size
        if callable(getattr(pl_module, "influence_loss", None)):
            self._collect(
                trainer,
                pl_module,
                lambda: live.run_hook(pl_module, batch, size, forward_context(trainer)),
                aside(trainer, pl_module),
            )
            return
        with self._guarded.contained():
            live.open()

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
            self._guarded.stop(SEVERAL_BACKWARDS)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the step to the training record, and measure the gradients on collected steps."""
        if self._live is None or self._plan is None:
            return
        with self._guarded.contained():
            self._collector.record.add_step(optimizer, self._plan.layers)
            self._figures.add_step(pl_module, self._plan.layers, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and clean up after a step without a backward pass."""
        self._from_backward = False
        if self._live is not None and self._live.is_open:
            self._guarded.close()
            if not (pl_module.automatic_optimization or self._collector.resolved):
                self._guarded.stop(LOSS_NOT_SEEN)
        self._guarded.end_batch()
        self._figures.log(trainer.loggers, self._collector.schedule.steps, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives, which load with ``weights_only=True``."""
        return self._store.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was saved; the next fit continues it."""
        self._store.load_state_dict(state_dict)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Complete the saved state with what only the Trainer knows: all processes' sums, and the weights."""
        if self.state_key not in checkpoint.get("callbacks", {}):
            return
        with self._guarded.contained():
            self._read_metric(trainer)
        sums = self._store.final or self._summed(trainer)
        weights = self._store.fingerprint or fingerprint(pl_module)
        checkpoint["callbacks"][self.state_key] = self._store.state_dict(sums, weights)

    def _begins(self, batch: Any) -> bool:
        """Return whether to collect a batch; its size is known then."""
        begins = self._guarded.begin_batch()
        if begins:
            begins = False
            with self._guarded.contained():
                self._batch_size, begins = batch_size_of(batch), True
        return begins

    def _collect(
        self,
        trainer: Trainer,
        module: LightningModule,
        capture: Callable[[], Captured],
        around: contextlib.AbstractContextManager[None] | None = None,
    ) -> None:
        measure = self._figures.due(trainer.loggers, self._collector.schedule.steps, log_every(trainer))
        self._figures.take(self._guarded.collect(capture, module, around=around, measure=measure))

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        self._guarded.close()
        weights = None
        if self._live is not None:
            with self._guarded.contained():
                self._read_metric(trainer)
                weights = fingerprint(module)
        self._store.end_fit(weights)

    def _summed(self, trainer: Trainer) -> Generations | None:
        return self._guarded.summed() if trainer.world_size > 1 else None

    def _read_metric(self, trainer: Trainer) -> None:
        if self._plan is None:
            return
        for optimizer in trainer.optimizers:
            self._collector.record.read_metric(optimizer, self._plan.layers)
