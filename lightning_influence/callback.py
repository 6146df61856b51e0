"""``InfluenceCallback``: collects factors, gradient statistics and the training record during ``fit``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_influence.collecting.collector import Collector, FitFisher
from lightning_influence.collecting.figures import Figures
from lightning_influence.collecting.notices import Notices
from lightning_influence.collecting.store import Store
from lightning_influence.errors import LossCaptureError, NonFiniteError
from lightning_influence.factors.factors import Factors, fingerprint
from lightning_influence.factors.training_record import TrainingRecord
from lightning_influence.host.fit import (
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
from lightning_influence.layers import LayerPlan, find_layers
from lightning_influence.passes.captured import Captured
from lightning_influence.passes.live import LiveCapture, check_first, describe_coupling
from lightning_influence.state import InfluenceState


class InfluenceCallback(Callback):
    """Collects what influence estimates need while the Trainer fits, for a few percent of its time.

    On some batches the layers' inputs and gradients whose outer products average to the Gauss-Newton
    matrix are recorded on the user's own forward pass, before the user's backward pass; weights, gradients
    and random states of the training are untouched. Sums are kept over windows that double (see
    :mod:`~lightning_influence.factors.schedule`), so that recent factors exist whenever training ends. They
    are saved in every full checkpoint and continue when training is resumed from one. A checkpoint that is
    saved after a question was asked also holds what the answer was computed from and later ones can use (the
    coarse space of two-level EK-FAC, factors from a pass), each unless it takes more than 256 MiB.

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
        ValueError: if a setting is out of range.
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
        if fisher not in get_args(FitFisher):
            accepted = ", ".join(repr(choice) for choice in get_args(FitFisher))
            raise ValueError(f"Got fisher={fisher!r}; accepted during fit are {accepted}.")
        self._layers = None if layers is None else list(layers)
        self._fisher = fisher
        self._store = Store(
            fisher, every_n_steps=every_n_steps, overhead=overhead, statistics=log_statistics, seed=seed
        )
        self._plan: LayerPlan | None = None
        self._live: LiveCapture | None = None
        self._backwards = 0
        self._figures = Figures(log_statistics)
        self._say = Notices()
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
    def state_key(self) -> str:
        """The same for all settings that may change between a run and its continuation."""
        if self._layers is None and self._fisher == "mixed":
            return type(self).__name__
        return self._generate_state_key(layers=self._layers, fisher=self._fisher)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give a plain Trainer the methods ``influence`` and ``self_influence``."""
        from lightning_influence.trainer import attach  # it imports this module

        attach(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, and continue what was collected before if it belongs to these weights."""
        self._live = None
        self._store.begin_fit()
        reason = why_not_collect(trainer)
        if reason is not None:
            self._refuse(reason)
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
        self._live = LiveCapture(plan)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the record, and sum over processes."""
        self._finish(trainer, pl_module)
        if self._live is not None and trainer.world_size > 1:
            self._store.final = self._collector.summed()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove all hooks."""
        self._finish(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this batch is collected, and put hooks in place."""
        self._figures.clear()
        self._backwards = 0
        if self._live is None or not self._begins():
            return
        live, size = self._live, batch_size_of(batch)
        if not callable(getattr(pl_module, "influence_loss", None)):
            self._batch_size = size
            live.open()
            return
        with aside(trainer, pl_module):
            self._collect(
                trainer, pl_module, lambda: live.run_hook(pl_module, batch, size, forward_context(trainer))
            )

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
            self._refuse(SEVERAL_BACKWARDS)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the step to the training record, and measure the gradients on collected steps."""
        if self._live is None or self._plan is None:
            return
        self._collector.record.add_step(optimizer, self._plan.layers)
        self._figures.add_step(pl_module, self._plan.layers, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and clean up after a step without a backward pass."""
        self._from_backward = False
        if self._live is not None and self._live.is_open:
            self._close()
            if not (pl_module.automatic_optimization or self._collector.resolved):
                self._refuse(LOSS_NOT_SEEN)
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
        self._read_metric(trainer)
        sums = self._store.final
        if sums is None and self._live is not None and trainer.world_size > 1:
            sums = self._collector.summed()
        weights = self._store.fingerprint or fingerprint(pl_module)
        checkpoint["callbacks"][self.state_key] = self._store.state_dict(sums, weights)

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
        measure = self._figures.due(trainer.loggers, steps, log_every(trainer))
        try:
            with torch.enable_grad():
                captured = capture()
                if first:
                    check_first(captured, module)
                self._figures.take(self._collector.add(captured, module, measure=measure))
        except NonFiniteError as error:
            self._say(f"A batch was left out of the factors: {error}", "non-finite")
        except LossCaptureError as error:
            if first:
                raise
            self._say(f"A batch was left out of the factors: {error}", "loss")
        finally:
            self._close()

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()
        if self._live is None:
            self._store.end_fit()
        else:
            self._read_metric(trainer)
            self._store.end_fit(fingerprint(module))

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
        self._store.reset()
        self._say(f"Nothing is collected during this fit: {reason}")
