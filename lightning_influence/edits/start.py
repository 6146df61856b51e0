"""Where an edit sets out: its layers, the losses there, and the objective that it lowers from there."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.edits.data import EditData
from lightning_influence.edits.editable_weights import EditableWeights, find_editable_layers, read_decays
from lightning_influence.edits.losses import Losses, LossPass, Sample, draw_sample, take_most_curved
from lightning_influence.edits.objective import LossGradientPass, Objective, Source, Whole
from lightning_influence.edits.request import EditOptions, EditRequest
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.reading import prepare
from lightning_influence.running.runner import Runner
from lightning_influence.support.notes import Notes

# Kept examples that a relabelling's objective is measured on at least, once it has set out from all. Chosen
# by hand: a step costs a gradient of so many examples, and the finished edit is checked on all.
OBJECTIVE_EXAMPLES = 128


@dataclass(frozen=True)
class Start:
    """A module at the weights that an edit sets out from, and what is known there.

    Attributes:
        runner: an entered runner on the module.
        data: the training examples, split.
        options: settings.
        weights: the editable weights.
        losses: of all training examples, at their new targets if they have any.
        objective: the training objective after the edit, where steps depend on it; else None.
        validation: loaders to measure the kept loss on in place of the kept examples; None without.
        notes: where to say what was assumed.
        began: when the edit was asked for, in seconds of :func:`time.perf_counter`.
    """

    runner: Runner
    data: EditData
    options: EditOptions
    weights: EditableWeights
    losses: Losses
    objective: Objective | None
    validation: list[IndexedLoader] | None = None
    notes: Notes = field(default_factory=Notes)
    began: float = 0.0

    @property
    def forgets(self) -> bool:
        """Whether the examples are removed rather than relabelled."""
        return self.data.targets is None

    @property
    def searches(self) -> bool:
        """Whether steps are looked for by evaluating the model."""
        return self.options.step == "search"

    @property
    def descends(self) -> bool:
        """Whether all linearisations after the first one are quasi-Newton steps."""
        return self.searches and not self.forgets

    @property
    def linearisations(self) -> int:
        """How often the model is linearised at most."""
        return self.options.count_linearisations(not self.forgets)

    @cached_property
    def sums(self) -> tuple[float, float]:
        """``W_E`` and ``W_K``: the weights of all edited and of all kept examples."""
        edited, kept = (self.losses.at(part) for part in (self.data.edited, self.data.kept))
        return float(edited.weights.sum()), float(kept.weights.sum())

    @property
    def share(self) -> float:
        """``p``: the edited examples' share of the weight of the training data."""
        edited, kept = self.sums
        return edited / (edited + kept)

    @property
    def scale(self) -> float:
        """The theory's step: ``W_E / W_K`` to forget, ``p`` to relabel."""
        edited, kept = self.sums
        return edited / kept if self.forgets else self.share

    @cached_property
    def samples(self) -> tuple[Sample, Sample]:
        """Edited and kept examples that their curvature is an average over."""
        limit, seed = self.options.count_curvature_examples(not self.forgets), self.options.seed
        edited, kept = (self.losses.at(part) for part in (self.data.edited, self.data.kept))
        return take_most_curved(edited, limit, seed), take_most_curved(kept, limit, seed)


def set_out(runner: Runner, request: EditRequest, data: EditData, record: TrainingRecord | None) -> Start:
    """Find the layers that an edit may change, and measure what it starts from.

    Args:
        runner: an entered runner on the module.
        request: what is asked.
        data: the training examples, split as the request says.
        record: of the training run, for its weight decay.

    Returns:
        The start; the module is as it was.

    Raises:
        InfluenceError: a subclass that says what cannot be edited, and what to do.
    """
    began, options, notes = time.perf_counter(), request.options, runner.notes
    plan = find_editable_layers(runner, data, request.layers, notes)
    forgets, searches = data.targets is None, options.step == "search"
    # A search for forgetting goes many times as far as the theory says: so would the shrinkage of the record.
    decays = read_decays(plan, options.weight_decay, None if forgets and searches else record)
    weights = EditableWeights(runner.module, plan, decays)
    validation = None if request.validation is None else prepare(request.validation)
    survey = _Survey(runner, data, weights)
    if not forgets:
        held_out = validation if searches else None
        losses, objective = survey.relabel(_limit_objective(options), options.seed, held_out)
    elif searches or options.count_linearisations(False) == 1:
        losses, objective = survey.measure(data.every_loader, data).losses, None
    else:
        losses, objective = survey.forget()
    return Start(runner, data, options, weights, losses, objective, validation, notes, began)


def _limit_objective(options: EditOptions) -> int | None:
    """Return how many kept examples the objective of a relabelling is measured on; None for all."""
    given = 0 if options.curvature_examples == "auto" else options.curvature_examples
    return None if given is None else max(given, OBJECTIVE_EXAMPLES)


@dataclass(frozen=True)
class _Part:
    """A share of an objective.

    Attributes:
        losses: of its examples.
        gradient: of their sum, ``(P,)``; None if it was not asked for.
        factor: of their mean loss in the objective.
    """

    losses: Losses
    gradient: Tensor | None
    factor: float = 1.0

    def times(self, factor: float) -> _Part:
        return replace(self, factor=factor * self.factor)


@dataclass(frozen=True)
class _Survey:
    """Measures the losses where an edit sets out, and makes the objective of what is found.

    Attributes:
        runner: an entered runner on the module.
        data: the examples.
        weights: the editable weights.
    """

    runner: Runner
    data: EditData
    weights: EditableWeights

    def measure(
        self,
        loader: IndexedLoader,
        data: EditData | None,
        chosen: Tensor | None = None,
        *,
        differentiates: bool = False,
    ) -> _Part:
        """Return the losses of some examples of a loader, or of all, and their gradient if it is needed."""
        if not differentiates:
            plain = LossPass(self.weights.plan, data, chosen)
            self.runner.run(plain, [loader])
            return _Part(plain.result(), None)
        one_pass = LossGradientPass(self.weights, data, chosen)
        self.runner.run(one_pass, [loader])
        return _Part(one_pass.result(), one_pass.gradient)

    def forget(self) -> tuple[Losses, Objective]:
        """Return all losses, and the objective after the edited examples are gone, over all kept ones."""
        losses = self.measure(self.data.every_loader, self.data).losses
        sample = take_most_curved(losses.at(self.data.kept), None, 0)
        source = Source(self.data.loader, sample, self.data)
        return losses, Objective(self.runner, self.weights, [source])

    def relabel(
        self, limit: int | None, seed: int, held_out: Sequence[IndexedLoader] | None
    ) -> tuple[Losses, Objective]:
        """Return the losses of all training examples, and the objective after a relabelling.

        Args:
            limit: how many kept examples the objective is measured on, together with all edited ones; None
                for all.
            seed: of their draw.
            held_out: what counts in place of the kept examples; None for these.
        """
        data = self.data
        if held_out is not None:
            return self._relabel_held_out(limit, seed, held_out)
        samples = limit is not None and len(data.kept) > limit
        part = self.measure(data.every_loader, data, differentiates=samples)
        edited, kept = part.losses.at(data.edited), part.losses.at(data.kept)
        share = float(edited.weights.sum() / part.losses.weights.sum())
        sample = draw_sample(kept, limit, seed).mix(take_most_curved(edited, None, seed), share)
        source = Source(data.loader, sample, data)
        return part.losses, Objective(self.runner, self.weights, [source], _join([part]))

    def _relabel_held_out(
        self, limit: int | None, seed: int, loaders: Sequence[IndexedLoader]
    ) -> tuple[Losses, Objective]:
        """Return the same with other data in place of the kept examples."""
        data, count = self.data, sum(loader.num_examples for loader in loaders)
        samples = limit is not None and count > limit
        training = self.measure(data.every_loader, data)
        own = self.measure(data.edited_loader, data, data.edited, differentiates=samples)
        share = float(own.losses.weights.sum() / training.losses.weights.sum())
        edited = take_most_curved(own.losses, None, seed).times(share)
        sources, parts = [Source(data.loader, edited, data)], [own.times(share)]
        others = [self.measure(loader, None, differentiates=samples) for loader in loaders]
        total = sum(float(part.losses.weights.sum()) for part in others)
        for part, loader in zip(others, loaders, strict=True):
            factor = (1 - share) * float(part.losses.weights.sum()) / total
            few = None if limit is None else math.ceil(limit * loader.num_examples / count)
            sources.append(Source(loader, draw_sample(part.losses, few, seed).times(factor)))
            parts.append(part.times(factor))
        return training.losses, Objective(self.runner, self.weights, sources, _join(parts))


def _join(parts: Sequence[_Part]) -> Whole | None:
    """Return the value and the gradient of an objective; None if the gradient was not asked for."""
    value, gradient = 0.0, None
    for part in parts:
        if part.gradient is None:
            return None
        value += part.factor * part.losses.mean()
        term = part.gradient * (part.factor / float(part.losses.weights.sum()))
        gradient = term if gradient is None else gradient + term
    return None if gradient is None else Whole(value, gradient)
