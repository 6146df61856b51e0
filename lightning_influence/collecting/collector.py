"""What the callback collects, and when: sums, schedule and record of one run, without Lightning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_influence.collecting.failures import ON_ANOTHER_PROCESS, CollectingError, contained
from lightning_influence.collecting.figures import noise_and_signal, spectrum, squared_norms
from lightning_influence.collecting.generations import Generations
from lightning_influence.collecting.schedule import Costs, Schedule
from lightning_influence.curvature.factor_passes import add_covariances, add_squares
from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.model.captured import RANDOM, Captured
from lightning_influence.model.gradients import FactoredGradients, check_finite
from lightning_influence.model.losses.draws import draw_generator
from lightning_influence.model.plan import LayerPlan
from lightning_influence.support.errors import NonFiniteError
from lightning_influence.support.storage import check_version

#: What can be collected during a fit: one backward pass a batch.
FitFisher = Literal["mixed", "sampled", "empirical"]

_VERSION = 1
# The noise scale takes another backward pass; it is measured on every so many collected batches.
_NOISE_EVERY = 8
_NOISE_MEMORY = 0.8


class Collector:
    """Sums, schedule and training record of one run.

    Args:
        fisher: which output gradients to use.
        overhead: share of the training steps that collecting may cost.
        every_n_steps: collect every n-th batch instead.
        statistics: whether to measure what is only logged.
        seed: seed of the draws.

    Attributes:
        schedule: decides when.
        generations: the sums.
        record: what the optimizer did.
        collected: number of batches collected.
        failure: why nothing more is collected in this fit, None if all is well. Among several processes one
            that fails goes on counting, for the sums that all of them take part in, until the others know.
    """

    def __init__(
        self,
        fisher: FitFisher = "mixed",
        *,
        overhead: float = 0.05,
        every_n_steps: int | None = None,
        statistics: bool = True,
        seed: int = 0,
    ) -> None:
        self.schedule = Schedule(overhead=overhead, every_n_steps=every_n_steps)
        self.generations = Generations()
        self.generations.current.fisher = fisher
        self.record = TrainingRecord()
        self.collected = 0
        self.failure: str | None = None
        self._pending = False  # whether the batch is to be collected and not counted yet
        self._fisher, self._statistics, self._seed = fisher, statistics, seed
        self._scale = 0.0
        self._noise = [0.0, 0.0, 0.0]
        self._rank = (0, 1)
        self._share: Callable[[Tensor], Tensor] | None = None

    @property
    def resolved(self) -> bool:
        """Whether a batch was collected: the first one's loss has to be found, later ones may be left out."""
        return self.schedule.costs is not None

    @property
    def shared(self) -> bool:
        """Whether other processes collect along."""
        return self._share is not None

    def start(
        self, plan: LayerPlan, rank: int, world_size: int, share: Callable[[Tensor], Tensor] | None
    ) -> None:
        """Prepare for a fit.

        Args:
            plan: the covered layers.
            rank: number of this process.
            world_size: number of processes.
            share: sums a tensor over the processes in place, None for one process.
        """
        self.plan, self.failure = plan, None
        self.record.start()
        self._rank, self._share = (rank, world_size), share
        if share is not None:
            self.generations.fill(plan.layers)

    def begin_batch(self) -> bool:
        """Count a batch, begin windows and decompose when it is time.

        Returns:
            Whether to collect the batch.

        Raises:
            NonFiniteError: if the covariances could not be decomposed; they are dropped.
            CollectingError: if anything else failed, on any process.
        """
        # Among several, the others would wait for the sums of one that fails in between: let it end the run.
        with contextlib.nullcontext() if self.shared else contained(NonFiniteError):
            self._pending = self._begin_batch()
        if self._pending and self.failure is not None:
            self._count()
            return False
        return self._pending

    def _begin_batch(self) -> bool:
        self.schedule.advance()
        if self.schedule.starts_window():
            self.generations.start_window()
            if self._share is not None:
                self.generations.fill(self.plan.layers)
        if self.schedule.wants_basis():
            self._make_bases()
        return self.schedule.should_collect()

    def _make_bases(self) -> None:
        self.agree()
        try:
            self.generations.make_bases(self._share)
        except NonFiniteError:
            # Sums that cannot be decomposed are of no use to anybody: the next batch begins new ones.
            self.generations.drop_current()
            self.schedule.end = self.schedule.steps
            raise
        self.schedule.note_basis()

    def add(self, captured: Captured, module: nn.Module, *, measure: bool) -> dict[str, float]:
        """Add one batch.

        Args:
            captured: the training step, its graph alive.
            module: the model.
            measure: whether to return figures.

        Returns:
            Figures to log; empty without ``measure``.

        Raises:
            NonFiniteError: if a gradient is not finite; nothing is stored.
        """
        gradients = self._gradients(captured)
        self.schedule.note_costs(_costs(gradients, captured, module))
        phase, noisy = self.schedule.phase, self._count()
        check_finite(gradients)
        self.record.loss_scale = self._mean_scale(captured)
        current = self.generations.current
        if phase == "covariances":
            add_covariances(current, gradients, captured)
        else:
            add_squares(current, gradients)
        self.generations.settle(self.schedule.planned, self.schedule.taken)
        if noisy:
            self._add_noise(captured)
        return self._figures(gradients, captured) if measure else {}

    def fail(self, error: CollectingError) -> None:
        """Collect nothing more in this fit.

        Args:
            error: why.

        Raises:
            CollectingError: the same, if this one of several processes cannot go on counting: the others know
                what a batch costs and it does not.
        """
        self.failure = str(error)
        if self.resolved and self._pending:
            self._count()
        elif self.shared and not self.resolved and self.schedule.steps > 1:
            raise error

    def agree(self) -> None:
        """Find out whether collecting failed on any process; every process has to call it.

        Raises:
            CollectingError: with the reason, if it did.
        """
        if self._share is None:
            return
        if float(self._share(torch.tensor([float(self.failure is not None)]))):
            raise CollectingError(self.failure or ON_ANOTHER_PROCESS)

    def end_batch(self) -> None:
        """Let the processes agree on the first batch: one that fails in it does not know what a batch costs.

        Raises:
            CollectingError: if it failed on any.
        """
        if self.schedule.steps == 1:
            self.agree()

    def summed(self) -> Generations:
        """Return the sums over all processes; every process has to call it.

        Raises:
            CollectingError: if collecting failed on any.
        """
        self.agree()
        return self.generations if self._share is None else self.generations.summed(self._share)

    def state_dict(self, generations: Generations | None = None) -> dict[str, Any]:
        """Return tensors and primitives, with other sums in place of this process's if given."""
        return {
            "version": _VERSION,
            "schedule": self.schedule.state_dict(),
            "generations": (generations or self.generations).state_dict(),
            "record": self.record.state_dict(),
            "collected": self.collected,
            "scale": self._scale,
            "noise": list(self._noise),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the settings stay those of this object.

        Raises:
            FactorMismatchError: if the state was written by an incompatible version.
        """
        check_version(
            state,
            _VERSION,
            subject="The callback's state has",
            remedy="Resume without it, or train with the version that wrote it.",
        )
        settings = self.schedule.overhead, self.schedule.every_n_steps
        self.schedule = Schedule.from_state_dict(state["schedule"])
        self.schedule.overhead, self.schedule.every_n_steps = settings
        self.generations = Generations.from_state_dict(state["generations"])
        self.record = TrainingRecord.from_state_dict(state["record"])
        self.collected, self._scale = state["collected"], state["scale"]
        self._noise = list(state["noise"])

    def _gradients(self, captured: Captured) -> dict[str, FactoredGradients]:
        generator = None
        if captured.loss is not None and self._fisher in RANDOM:
            rank, world_size = self._rank
            number = self.collected * world_size + rank
            generator = draw_generator(self._seed, number, captured.loss.outputs.device)
        return captured.curvature_gradients(self._fisher, generator)

    def _count(self) -> bool:
        """Count a batch as collected.

        Returns:
            Whether its noise scale is to be measured.
        """
        noisy = self._statistics and self.collected % _NOISE_EVERY == 0
        assert self.schedule.costs is not None
        self.schedule.note_collected(self.schedule.costs.covariances if noisy else 0.0)
        self.collected += 1
        self._pending = False
        return noisy

    def _mean_scale(self, captured: Captured) -> float:
        """Return the average of the factor between batch loss and mean loss over collected batches."""
        self._scale += 1.0 if captured.loss is None else captured.loss.scale
        return self._scale / self.collected

    def _add_noise(self, captured: Captured) -> None:
        pair = noise_and_signal(captured.loss_gradients())
        if pair is not None:
            new = (*pair, 1.0)
            self._noise = [_NOISE_MEMORY * old + x for old, x in zip(self._noise, new, strict=True)]

    def _figures(self, gradients: Mapping[str, FactoredGradients], captured: Captured) -> dict[str, float]:
        best = self.generations.best
        figures = spectrum(best)
        if all(layer.inputs.shape[2] == 1 for layer in gradients.values()):
            figures["trace"] = float(squared_norms(gradients).mean()) / best.mean_weight
        noise, signal, _ = self._noise
        if noise > 0 and signal > 0:
            figures["noise_scale"] = noise / signal
        figures["examples"] = float(max(layer.examples for layer in best.layers.values()))
        figures["collected_batches"] = float(self.collected)
        return figures


def _costs(gradients: Mapping[str, FactoredGradients], captured: Captured, module: nn.Module) -> Costs:
    shapes = [
        (layer.inputs.shape[0], layer.inputs.shape[2], layer.outputs.shape[-1], layer.inputs.shape[-1])
        for layer in gradients.values()
    ]
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Costs.count(shapes, captured.num_examples, parameters)
