"""One fit's collecting: captures of its steps, and what they add to the sums of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_influence.collecting.figures import (
    estimate_noise_and_signal,
    measure_spectrum,
    sum_squared_norms,
)
from lightning_influence.collecting.processes import CollectingError, Processes, describe_error
from lightning_influence.collecting.schedule import Costs
from lightning_influence.collecting.state import Run, Settings
from lightning_influence.collecting.stopwatch import Stopwatch
from lightning_influence.collecting.sums import AllReduce, WindowSums, copy_statistics
from lightning_influence.curvature.factor_passes import add_weights
from lightning_influence.curvature.thinning import mix_examples, thin_rows
from lightning_influence.model.captured import RANDOM, Captured
from lightning_influence.model.finite import check_finite, check_finite_tensors
from lightning_influence.model.layers.gradients import FactoredGradients
from lightning_influence.model.layers.layer import Layer
from lightning_influence.model.layers.plan import LayerPlan
from lightning_influence.model.live.live_capture import LiveCapture, check_first
from lightning_influence.model.losses.draws import COVARIANCES, SQUARES, draw_generator
from lightning_influence.support.errors import NonFiniteError
from lightning_influence.support.notes import Notices
from lightning_influence.support.waiting import settle

# The noise scale takes another backward pass, as much as collecting a batch once more. Chosen by hand: on
# every eighth collected batch it adds an eighth to what collecting costs, and the running means below
# remember about five measurements (1 / (1 - 0.8)), enough to smooth the log and few enough to follow it.
_NOISE_EVERY = 8
_NOISE_MEMORY = 0.8
# What the first batch's checks cost, in batches whose covariances are summed: six backward passes, of which
# one goes to the weights.
_CHECK_COSTS = 3
# Measured costs are of so many batches at least: those of one are off by what the machine does beside. Chosen
# by hand.
_FEWEST_MEASURED = 2
TRAINS_ON = (
    "Training goes on as without the callback, and factors will be fitted in a pass of their own when "
    "influence is asked for."
)


Made = TypeVar("Made")


class Collector:
    """Adds one fit's batches to a run.

    Several processes meet at the first batch, at every eigendecomposition and whenever sums are asked for.
    Between these meetings a process whose collecting failed goes on counting batches, because the others
    wait for it at the next one; there all learn of the failure and stop at the same step.

    Args:
        run: what the fit continues.
        settings: what to collect.
        plan: the covered layers.
        processes: who collects along.
        say: gives warnings.
        recorded: layers and parameters whose optimizer steps are recorded.
        logs: whether anybody logs figures.

    Attributes:
        run: sums, schedule and record.
        plan: the covered layers.
        recorded: as given.
        watch: times the steps and what is done in them.
        live: the capture of the step that runs.
        failure: why this process adds nothing more, None if all is well.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        plan: LayerPlan,
        processes: Processes,
        say: Notices,
        recorded: Mapping[str, Layer],
        *,
        logs: bool,
    ) -> None:
        self.run, self.plan, self.live, self.recorded = run, plan, LiveCapture(plan), recorded
        self.failure: str | None = None
        self._settings, self._processes, self._say = settings, processes, say
        self.watch, self._logs = Stopwatch(), logs and settings.statistics
        self._pending = False  # whether the batch is to be collected and not counted yet
        self._in_step = run.schedule.costs is not None  # whether all processes count with the same costs
        self._begin_measuring()
        run.record.start()
        if processes.share is not None:
            run.sums.fill(plan.layers)

    @property
    def is_shared(self) -> bool:
        """Whether other processes collect along."""
        return self._processes.share is not None

    @property
    def is_due(self) -> bool:
        """Whether the batch is to be collected by all processes whose collecting has not failed."""
        return self._pending

    def begin_batch(self) -> bool:
        """Count a batch, begin windows and decompose when it is time.

        Returns:
            Whether to collect the batch.

        Raises:
            CollectingError: if collecting failed on any process.
        """
        schedule, sums = self.run.schedule, self.run.sums
        self.watch.begin_step()
        schedule.steps += 1
        if schedule.starts_window():
            self._correct_costs()
            sums.start_window()
            if self.is_shared:
                self._prepare(lambda: sums.fill(self.plan.layers))
        if schedule.wants_basis():
            with self.watch.working():
                self._make_bases()
            self._correct_costs()
        self._pending = schedule.should_collect()
        return self._pending and self.failure is None

    def add(self, captured: Captured, module: nn.Module, *, measure: bool) -> dict[str, float]:
        """Add one batch, whose first is checked for examples that depend on each other.

        Args:
            captured: the training step, its graph alive.
            module: the model, in the mode of the step.
            measure: whether to return figures.

        Returns:
            Figures to log; empty without ``measure``.

        Raises:
            NonFiniteError: if a gradient is not finite; nothing is stored.
            UnsupportedModelError: if the examples of the first batch depend on each other.
        """
        run, fisher, first = self.run, self._settings.fisher, self.run.schedule.costs is None
        if first:
            captured.recorder.inputs(captured.num_examples)  # names a layer whose rows are no examples
            check_first(captured, module)
        number = run.collected * self._processes.world_size + self._processes.rank
        drawn = captured.loss is not None and fisher in RANDOM
        draws, thinning = (
            draw_generator(self._settings.seed, number, device, purpose)
            for device, purpose in ((self._device_of(captured), COVARIANCES), ("cpu", SQUARES))
        )
        outputs = captured.curvature_outputs(fisher, draws if drawn else None)
        if first:
            self._note_costs(outputs, captured.num_examples, module)
        phase, noisy = run.schedule.phase, self._count(checked=first)
        if phase == "covariances":
            self._add_covariances(captured, outputs, thinning)
        else:
            self._add_squares(captured, outputs, thinning)
        run.scale += 1.0 if captured.loss is None else captured.loss.scale
        run.record.loss_scale = run.scale / run.collected
        run.sums.settle(run.schedule.planned, run.schedule.taken)
        pair = estimate_noise_and_signal(captured.loss_gradients()) if noisy else None
        if pair is not None:
            run.noise = [_NOISE_MEMORY * old + x for old, x in zip(run.noise, (*pair, 1.0), strict=True)]
        return self._measure(captured, outputs) if measure else {}

    def end_batch(self) -> None:
        """Keep several processes in step: in what they have counted, and in what a batch costs.

        Raises:
            CollectingError: if collecting failed on any process in the first batch.
        """
        self.watch.end_step()
        if self._unmeasured:  # the first batch is checked, and slower
            self._begin_measuring()
        share = self._processes.share
        if share is None:
            return
        if not self._in_step:
            self._agree_on_costs(share)
        elif self._pending:  # it was left out here and maybe not elsewhere
            self._count()

    def agree(self) -> None:
        """Find out whether collecting failed on any process; every process has to call it.

        Raises:
            CollectingError: with the reason, if it did.
        """
        share = self._processes.share
        if share is not None and float(share(torch.tensor([float(self.failure is not None)]))):
            raise CollectingError(
                self.failure or "Collecting failed on another process, whose warning gives the reason."
            )

    def sum_over_processes(self) -> WindowSums:
        """Return the sums over all processes; every process has to call it.

        Returns:
            The sums; of one process, its own.

        Raises:
            CollectingError: if collecting failed on any.
        """
        share = self._processes.share
        if share is None:
            return self.run.sums
        total = self._prepare(self.run.sums.copy)
        self.agree()
        assert total is not None
        total.reduce(share, self._processes.world_size)
        return total

    def fail(self, reason: str) -> None:
        """Add nothing more; the first reason is kept for the other processes."""
        self.failure = self.failure or reason

    def close(self) -> None:
        """Remove all hooks, and let go of what they recorded."""
        self.live.close()
        self.live.clear()

    def _add_covariances(
        self, captured: Captured, outputs: Mapping[str, Tensor], generator: torch.Generator
    ) -> None:
        rows, sums = thin_rows(captured, outputs, generator), self.run.sums
        check_finite_tensors({name: [layer.inputs, layer.outputs] for name, layer in rows.items()})
        settle()  # nothing of a batch that is not finite is stored
        sums.fill({name: self.plan.layers[name] for name in rows})
        for name, layer in rows.items():
            sums.current.layers[name].add_rows(layer.inputs, layer.outputs, layer.examples, layer.positions)
        add_weights(sums.current, captured)

    def _add_squares(
        self, captured: Captured, outputs: Mapping[str, Tensor], generator: torch.Generator
    ) -> None:
        gradients = {name: mix_examples(layer, generator) for name, layer in _join(captured, outputs).items()}
        check_finite(gradients)
        settle()
        statistics = self.run.sums.current.layers
        for name, layer in gradients.items():
            if name in statistics:  # a layer that no batch has used before has no basis yet
                statistics[name].add_squares(layer, captured.num_examples)

    @staticmethod
    def _device_of(captured: Captured) -> torch.device | str:
        return "cpu" if captured.loss is None else captured.loss.outputs.device

    def _note_costs(self, outputs: Mapping[str, Tensor], examples: int, module: nn.Module) -> None:
        """Count what a batch costs; in the following ones it is measured."""
        shapes = [
            (grads.shape[0], grads.shape[2], grads.shape[3], self.plan.layers[name].d_in)
            for name, grads in outputs.items()
        ]
        parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
        diagonal = [self.plan.layers[name].diagonal_sides for name in outputs]
        costs = Costs.count(shapes, examples, parameters, diagonal)
        self.run.schedule.note_costs(costs, examples * self._processes.world_size)
        self._unmeasured = True

    def _begin_measuring(self) -> None:
        self.watch.reset()
        self._unmeasured = False
        self._measured_from = self.run.schedule.spent, self.run.collected

    def _correct_costs(self) -> None:
        """Compare the counted costs with measured ones, of all processes together; they all call it."""
        run, share, watch = self.run, self._processes.share, self.watch
        spent, collected = self._measured_from
        if run.collected - collected < _FEWEST_MEASURED:
            return
        times = torch.tensor([watch.work, watch.training, watch.steps], dtype=torch.float64)
        work, training, steps = (times if share is None else share(times)).tolist()
        if training > 0:
            run.schedule.correct(
                work * steps / training / self._processes.world_size / (run.schedule.spent - spent)
            )
        self._begin_measuring()
        watch.begin_step()

    def _count(self, *, checked: bool = False) -> bool:
        """Count a batch as collected.

        Args:
            checked: whether its examples were checked.

        Returns:
            Whether its noise scale is to be measured.
        """
        run = self.run
        noisy = self._logs and run.collected % _NOISE_EVERY == 0
        assert run.schedule.costs is not None
        extra = (float(noisy) + _CHECK_COSTS * float(checked)) * run.schedule.costs.covariances
        run.schedule.note_collected(extra)
        run.collected += 1
        self._pending = False
        return noisy

    def _make_bases(self) -> None:
        """Decompose the covariances of the window, of all processes together.

        Memory is taken before the processes meet, and what may fail afterwards is done by each on its own:
        between two meetings a process may fail, in the middle of one the others would wait for it.
        """
        run, share = self.run, self._processes.share
        totals = dict(run.sums.current.layers)
        if share is not None:
            copies = self._prepare(lambda: {name: copy_statistics(layer) for name, layer in totals.items()})
            self.agree()
            assert copies is not None
            totals = copies
            for layer in totals.values():
                layer.reduce(share, covariances=True)
        try:
            run.sums.set_bases(totals)
        except NonFiniteError as error:
            # Sums that cannot be decomposed are of no use to anybody: the next batch begins new ones.
            self._say(str(error))
            run.sums.drop_current()
            run.schedule.end = run.schedule.steps
            return
        except Exception as error:
            if share is None:
                raise
            self.fail(describe_error(error))
        run.schedule.note_basis()

    def _agree_on_costs(self, share: AllReduce) -> None:
        """Take the mean of what a batch costs on the processes that know it.

        The costs decide when the processes meet next. Their batches may have different shapes, or one may
        have been left out, so that without it they would wait for each other at different steps.
        """
        self.agree()
        own = self.run.schedule.costs
        known = [0.0] * 6
        if own is not None:
            batch = float(self.run.schedule.batch)
            known = [1.0, own.covariances, own.squares, own.basis, own.hooks, batch]
        count, *sums = share(torch.tensor(known, dtype=torch.float64)).tolist()
        if count:
            *costs, batch = (value / count for value in sums)
            self.run.schedule.restart(Costs(*costs), round(batch))
            self.run.collected, self._in_step = 0, True
            self._count(checked=True)
            self._begin_measuring()

    def _prepare(self, make: Callable[[], Made]) -> Made | None:
        """Return what is made, or None after a failure, which the processes hear of when they next meet."""
        try:
            return make()
        except Exception as error:
            self.fail(describe_error(error))
            return None

    def _measure(self, captured: Captured, outputs: Mapping[str, Tensor]) -> dict[str, float]:
        run, best = self.run, self.run.sums.best
        figures = measure_spectrum(best)
        if all(grads.shape[2] == 1 for grads in outputs.values()):
            norms = sum_squared_norms(_join(captured, outputs))
            figures["trace"] = float(norms.mean()) / best.mean_weight
        noise, signal, _ = run.noise
        if noise > 0 and signal > 0:
            figures["noise_scale"] = noise / signal
        figures["examples"] = float(max(layer.examples for layer in best.layers.values()))
        figures["collected_batches"] = float(run.collected)
        return figures


def _join(captured: Captured, outputs: Mapping[str, Tensor]) -> dict[str, FactoredGradients]:
    """Return gradients of one seed, given their output gradients."""
    inputs = captured.recorder.inputs(captured.num_examples)
    return {name: FactoredGradients(inputs[name], grads[None]) for name, grads in outputs.items()}
