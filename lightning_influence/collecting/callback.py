"""``InfluenceCallback``: collects factors, gradient statistics and the training record during ``fit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_influence.collecting.checks import FitFisher
from lightning_influence.collecting.collector import TRAINS_ON, Collector
from lightning_influence.collecting.covered import find_collected
from lightning_influence.collecting.figures import Figures
from lightning_influence.collecting.fit_dynamics import FitDynamics
from lightning_influence.collecting.guard import Guard
from lightning_influence.collecting.moments import Moments
from lightning_influence.collecting.own_loss import OwnLoss
from lightning_influence.collecting.processes import CollectingError, Processes, describe_error
from lightning_influence.collecting.state import Dynamics, Kept, Settings
from lightning_influence.collecting.sums import WindowSums
from lightning_influence.curvature.factors import Factors, fingerprint
from lightning_influence.curvature.state import InfluenceState
from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.model.captured import Captured
from lightning_influence.model.layers.plan import ModuleLoss, find_layers
from lightning_influence.model.live.live_capture import (
    check_not_compiled,
    describe_coupling,
    pause_other_captures,
)
from lightning_influence.model.training_step import run_step
from lightning_influence.running.host.fit import (
    LOSS_NOT_SEEN,
    SEVERAL_BACKWARDS,
    check_collectable,
    count_examples,
    count_planned_batches,
    enter_precision,
    lent_parameters,
    make_all_reduce,
    read_log_interval,
    read_loss_divisor,
    refuse_step,
    set_aside,
    will_step,
)
from lightning_influence.running.host.packages import make_callback_class
from lightning_influence.running.host.trainer import attach_methods, keep_last_fit, splits_parameters
from lightning_influence.support.errors import InfluenceError, LossCaptureError, NonFiniteError
from lightning_influence.support.notes import Notices
from lightning_influence.support.random_states import RandomStates
from lightning_influence.support.waiting import reading_later

if not TYPE_CHECKING:  # a class that is made is no class to type checkers
    Callback = make_callback_class()


class InfluenceCallback(Callback):
    """Collects what influence estimates need while the Trainer fits, for a few percent of its time.

    On some batches the layers' inputs and gradients whose outer products average to the Gauss-Newton
    matrix are recorded on the user's own forward pass, before the user's backward pass; weights, gradients
    and random states of the training are untouched. Most are of the last eighth of a planned run, some of
    windows before it that double, so that recent factors exist whenever training ends. They are saved in
    every full checkpoint and continue when training is resumed from one. A checkpoint that is saved after a
    question was asked also holds what the answer was computed from and later ones can use (the coarse space
    of two-level EK-FAC, factors from a pass), each unless it takes more than 256 MiB.

    A fit that cannot be collected goes on as without the callback: a warning gives the reason, and whatever
    was collected until then is dropped, so that factors are never those of an unknown part of a run. They
    are fitted in a pass of their own when influence is asked for. This happens to a model without a covered
    layer or with compiled parts, to a loss that is not found, to examples that depend on each other, and to
    a saved state that cannot be read. Single batches whose loss is not finite, or not found after the first,
    are left out with a warning.

    The sums are those of the training itself: dropout and augmentations are on, and BatchNorm uses the batch.

    Args:
        layers: names or shell patterns of the modules to cover, with ``!`` before of those to leave out; all
            supported ones if None.
        fisher: ``"mixed"`` for random mixtures of the columns of the loss's curvature in the outputs, which
            are right on average and vary least; ``"sampled"`` for labels drawn from the model;
            ``"empirical"`` for the training labels.
        every_n_steps: collect every n-th batch; by default as many as ``overhead`` pays for, by the clock, so
            that equal runs may differ in which.
        overhead: share of the training steps' time that the callback may cost, eigendecompositions included;
            dynamics that are asked for (True) come on top.
        log_statistics: log figures of the curvature and the gradients under ``influence/``.
        seed: seed of the draws; the global random state is never used.
        strict: raise an error where collecting would otherwise stop with a warning.
        loss: a callable ``(module, batch)`` that returns the losses of the examples ``(B,)``, or the loss of
            the batch, where the training step's own couples the examples or cannot be found. It runs in
            addition to the step, on a copy of the batch, and should be given to the questions as well.
        dynamics: keep moments of each training example's loss and margin over the epochs, for
            :func:`~lightning_influence.training_dynamics`. They are read from the training step's own call of
            a loss function, by the index that the sampler drew; 52 bytes an example. They are not seen where
            the loss is written by hand or compiled, where a step runs several backward passes, and where
            examples have no index (iterable datasets, several loaders); True has one warning say so. "auto"
            leaves out epochs where they would take more than a fifth of the overhead, and datasets
            of more than a million examples.

    Raises:
        TypeError: if ``layers`` is no list of texts, or ``loss`` cannot be called.
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
        strict: bool = False,
        loss: ModuleLoss | None = None,
        *,
        dynamics: Dynamics = "auto",
    ) -> None:
        self._settings = Settings(
            layers, fisher, every_n_steps, overhead, log_statistics, seed, strict, loss, dynamics
        )
        self._kept = Kept(self._settings)
        self._collector: Collector | None = None  # of this fit, or the last; None if it collects nothing
        self._guard = Guard(self._handle)
        self._figures = Figures(log_statistics)
        self._say = Notices()
        self._dynamics = FitDynamics(self._settings, self._kept, self._say)
        # Of the batch that runs.
        self._batch_size, self._backwards, self._from_backward = 0, 0, False
        self._own_loss: OwnLoss | None = None  # of a fit whose module or settings have a loss

    @property
    def factors(self) -> Factors:
        """The most recent complete sums, else covariances; without layers if there are none."""
        return self._kept.factors

    @property
    def record(self) -> TrainingRecord | None:
        """What the optimizer did, or None before its first step."""
        return self._kept.record

    @property
    def num_collected(self) -> int:
        """Number of batches collected so far."""
        return self._kept.run.collected

    @property
    def extra_state(self) -> dict[str, Any]:
        """Tensors and primitives that are saved and restored along."""
        return self._kept.extra_state

    @property
    def influence_state(self) -> InfluenceState:
        """What queries start from, and leave for later ones until training goes on."""
        return self._kept.influence_state

    @influence_state.setter
    def influence_state(self, state: InfluenceState) -> None:
        self._kept.influence_state = state

    @property
    def dynamics(self) -> Moments | None:
        """Moments of each training example's loss, up to the last step; None if there are none."""
        return self._dynamics.read()

    @property
    def state_key(self) -> str:
        """The same for all settings that may change between a run and its continuation."""
        layers, fisher = self._settings.layers, self._settings.fisher
        if layers is None and fisher == "mixed":
            return type(self).__name__
        return self._generate_state_key(layers=layers, fisher=fisher)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give a plain Trainer the methods ``influence`` and ``self_influence``."""
        with self._guard:
            attach_methods(trainer)
        if stage == "fit":
            self._dynamics.open()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch no longer, whatever the run has come to."""
        self._leave_batch()
        self._dynamics.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, and continue what was collected before if it belongs to these weights."""
        self._collector = None
        processes = Processes(trainer.global_rank, trainer.world_size, make_all_reduce(trainer))
        with self._guard:
            self._collector = self._start(trainer, pl_module, processes)
        if processes.share is not None:  # all collect or none: they will wait for each other
            missing = float(processes.share(torch.tensor([float(self._collector is None)])))
            if missing and self._collector is not None:
                self._stop("Another process cannot collect, whose warning gives the reason.")
        is_collected = self._collector is not None
        if is_collected:
            self._dynamics.start(trainer, pl_module.device, processes)
        else:
            self._dynamics.close()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the losses of the epoch before enter the moments."""
        self._dynamics.begin_epoch(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clean up after a batch with which the module skipped the rest of the epoch."""
        self._leave_batch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the record, and sum over processes."""
        final = None
        with self._guard:
            keep_last_fit(trainer)
            final = self._sum_over_processes()
        self._dynamics.end_fit()
        self._finish(trainer, pl_module, final)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove all hooks; what a failed process has is not kept."""
        self._leave_batch()
        self._dynamics.close()
        if self._collector is not None and self._collector.failure is not None:
            self._stop(self._collector.failure)
        # Sharded weights and moments are read by all processes together, and one may have failed alone.
        self._finish(trainer, pl_module, None, reads=not splits_parameters(trainer))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this batch is collected, and put hooks in place."""
        self._leave_batch()
        self._figures.clear()
        self._backwards = 0
        self._begin_collecting(trainer, pl_module, batch, batch_idx)
        self._dynamics.begin_batch(trainer, batch)

    def _begin_collecting(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        collector = self._collector
        if collector is None:
            return
        with self._guard:
            collects = collector.begin_batch()
            if not collector.is_due:
                return
            own_loss, splits = self._own_loss, splits_parameters(trainer)
            # In the graph of a step with shards each backward pass of one process needs one of all others.
            if own_loss is None and not splits:
                if collects:
                    self._batch_size = count_examples(trainer, batch, batch_idx)
                    with collector.watch.working():
                        collector.live.open(pl_module)
                return
            with collector.watch.working(), lent_parameters(trainer, pl_module):
                if not collects:
                    return
                self._batch_size = count_examples(trainer, batch, batch_idx)
                with set_aside(trainer, pl_module, batch) as own, reading_later():
                    context, draws = enter_precision(trainer), RandomStates.read()
                    captured = collector.live.run_apart(pl_module, own, self._batch_size, context, run_step)
                    if own_loss is not None:
                        own_loss.note(captured, drawn=draws.have_moved())
                    self._add(trainer, pl_module, captured)
                if own_loss is not None and not splits:
                    own_loss.open(pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Collect from the graph that the user's step has just built."""
        self._backwards += 1
        self._dynamics.take(trainer, pl_module, loss)
        collector = self._collector
        if collector is None:
            return
        with self._guard:
            if collector.live.is_open:
                with collector.watch.working():
                    collector.live.close()
                    self._from_backward = True
                    divisor = read_loss_divisor(trainer, pl_module)
                    with set_aside(trainer, pl_module), reading_later():
                        captured = collector.live.resolve(loss, self._batch_size, divisor)
                        self._add(trainer, pl_module, captured)
            elif self._from_backward and self._backwards > 1:
                refuse_step(SEVERAL_BACKWARDS)
            elif self._own_loss is not None and self._backwards == 1:
                self._own_loss.compare_values(loss * read_loss_divisor(trainer, pl_module))
                if self._own_loss.is_open:
                    with collector.watch.working(), set_aside(trainer, pl_module), pause_other_captures():
                        self._own_loss.compare_gradients(loss, self._batch_size)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the step to the training record, and measure the gradients on collected steps."""
        collector = self._collector
        if collector is None:
            return
        with self._guard:
            if will_step(trainer, optimizer):
                collector.run.record.add_step(optimizer, collector.recorded)
                self._figures.add_step(pl_module, collector.plan.layers, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and clean up after a step without a backward pass."""
        self._from_backward = False
        self._dynamics.end_batch(self._backwards)
        with self._guard:
            if self._collector is not None and self._collector.live.is_open:
                self._collector.close()
                if not (pl_module.automatic_optimization or self._kept.run.schedule.costs):
                    refuse_step(LOSS_NOT_SEEN)
        if self._collector is not None and self._own_loss is not None:
            with self._guard:
                self._own_loss.judge(self._backwards)
        with self._guard:
            if self._collector is not None:
                self._collector.end_batch()
            self._figures.log(trainer.loggers, self._kept.run.schedule.steps, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives, which load with ``weights_only=True``."""
        state: dict[str, Any] = {}
        dynamics = self._dynamics.state_dict()
        with self._guard:
            state = self._kept.state_dict(dynamics=dynamics)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was saved; the next fit continues it.

        A state that cannot be read is left aside with a warning.

        Raises:
            InfluenceError: in its place, if the callback is strict.
        """
        self._collector = None
        try:
            self._kept.load_state_dict(state_dict)
        except InfluenceError as error:
            if self._settings.strict:
                raise
            self._say(f"What the checkpoint holds of an earlier fit is not used: {error}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Complete the saved state with what only the Trainer knows: all processes' sums, and the weights."""
        saved = checkpoint.get("callbacks", {})
        if saved.pop(self.state_key, None) is None:
            return
        dynamics = self._dynamics.state_dict(together=True)
        with self._guard:
            self._read_metric(trainer)
        with self._guard:
            sums = self._kept.final or self._sum_over_processes()
            weights = self._kept.fingerprint or fingerprint(pl_module)
            saved[self.state_key] = self._kept.state_dict(sums, weights, dynamics)

    def _start(self, trainer: Trainer, module: LightningModule, processes: Processes) -> Collector:
        """Return what collects this fit.

        Raises:
            UnsupportedModelError: if the model has no covered layer, or compiled parts.
            UnsupportedTrainerError: if the Trainer's steps cannot be collected.
        """
        self._kept.begin_fit()
        check_collectable(trainer)
        check_not_compiled(module)
        plan = find_collected(module, self._settings)
        self._say(plan.describe_uncovered())
        self._say(describe_coupling(module))
        why = self._kept.continue_or_reset(module, plan)
        self._say(why and f"What was collected in an earlier fit is dropped: {why}")
        run = self._kept.run
        run.schedule.set_horizon(count_planned_batches(trainer, run.schedule.steps))
        if self._kept.restored and processes.rank > 0:  # what was loaded are sums over all processes
            run.sums = run.sums.emptied()
        self._kept.continued, self._kept.restored = self._kept.restored, False
        run.sums = run.sums.to(module.device)
        named = "`loss=`" if self._settings.loss is not None else "`influence_loss`"
        has_own = self._settings.loss is not None or callable(getattr(module, "influence_loss", None))
        self._own_loss = OwnLoss(plan, named, self._say) if has_own else None
        # Questions may be about all parameters, and the record tells their damping.
        recorded, logs = find_layers(module).layers, bool(trainer.loggers)
        return Collector(run, self._settings, plan, processes, self._say, recorded, logs=logs)

    def _leave_batch(self) -> None:
        """Let go of a batch that was begun and has not ended, as where the module has skipped it."""
        self._dynamics.leave_batch()
        if self._own_loss is not None:
            self._own_loss.close()
        if self._collector is not None and self._collector.live.is_open:
            with self._guard:
                self._collector.close()

    def _add(self, trainer: Trainer, module: LightningModule, captured: Captured) -> None:
        collector = self._collector
        assert collector is not None
        measure = self._figures.is_due(
            trainer.loggers, collector.run.schedule.steps, read_log_interval(trainer)
        )
        with pause_other_captures():
            self._figures.keep(collector.add(captured, module, measure=measure))
        collector.close()

    def _finish(
        self, trainer: Trainer, module: LightningModule, final: WindowSums | None, *, reads: bool = True
    ) -> None:
        weights = None
        with self._guard:
            if self._collector is not None:
                self._collector.close()
                if reads:
                    self._read_metric(trainer)
                    weights = fingerprint(module)
        self._kept.end_fit(weights, final)

    def _sum_over_processes(self) -> WindowSums | None:
        """Return the sums over several processes; None on one, and where nothing is collected."""
        collector = self._collector
        return collector.sum_over_processes() if collector is not None and collector.is_shared else None

    def _read_metric(self, trainer: Trainer) -> None:
        if self._collector is not None:
            for optimizer in trainer.optimizers:
                self._collector.run.record.read_metric(optimizer, self._collector.recorded)

    def _handle(self, error: Exception) -> None:
        """Keep what went wrong in a hook from the training: leave out the batch, or stop collecting.

        Among several processes one that fails tells the others when they next meet, and all stop there.

        Raises:
            Exception: the error, if the callback is strict and would stop.
        """
        collector = self._collector
        if collector is not None:
            collector.close()
            found_before = collector.run.schedule.costs is not None
            if isinstance(error, NonFiniteError) or (isinstance(error, LossCaptureError) and found_before):
                self._say(f"A batch was left out of the factors: {error}", type(error).__name__)
                return
        if self._settings.strict:
            self._drop()
            raise error
        if collector is None or not collector.is_shared or isinstance(error, CollectingError):
            self._stop(describe_error(error))
        else:
            collector.fail(describe_error(error))
            self._tell(describe_error(error))

    def _stop(self, reason: str) -> None:
        """Collect nothing for the rest of this fit, and drop what was."""
        self._tell(reason)
        self._drop()

    def _drop(self) -> None:
        if self._collector is not None:
            self._collector.close()
        self._collector = None
        self._kept.reset()

    def _tell(self, reason: str) -> None:
        dropped = " What was collected before is dropped." if self._kept.run.collected else ""
        self._say(f"Nothing is collected during this fit: {reason} {TRAINS_ON}{dropped}", reason)
