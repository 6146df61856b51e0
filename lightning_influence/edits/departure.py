"""Where an edit sets out: the losses of all examples, and the objective that it lowers from there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_influence.edits.data import EditData
from lightning_influence.edits.objective import DepartingPass, Objective, Source, Whole
from lightning_influence.edits.passes import Losses, LossPass
from lightning_influence.edits.sampling import drawn, most_curved
from lightning_influence.edits.weights import Weights
from lightning_influence.model.plan import LayerPlan
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.runner import Runner


@dataclass(frozen=True)
class Departure:
    """A module at the weights that an edit changes.

    Attributes:
        runner: an entered runner on the module.
        plan: the covered layers.
        data: the examples.
        weights: the covered weights, as they were.
        decay: weight decay of each of them, ``(P,)``.
    """

    runner: Runner
    plan: LayerPlan
    data: EditData
    weights: Weights
    decay: Tensor

    def forgetting(self, losses: Losses) -> Objective:
        """Return the objective after the edited examples are gone, over all kept ones.

        Args:
            losses: of all examples.
        """
        sample = most_curved(losses.at(self.data.kept), None, 0)
        return self._objective([Source(self.data.loader, sample, self.data)], None)

    def relabelling(
        self, limit: int | None, seed: int, held_out: list[IndexedLoader] | None
    ) -> tuple[Losses, Objective]:
        """Return the losses of all training examples, and the objective after a relabelling.

        Args:
            limit: how many kept examples the objective is measured on, together with all edited ones; None
                for all.
            seed: of their draw.
            held_out: what counts in place of the kept examples; None for these.
        """
        if held_out is not None:
            return self._held_out(limit, seed, held_out)
        data = self.data
        part = self._measured(data.every_loader, data, limit is not None and len(data.kept) > limit)
        edited, kept = part.losses.at(data.edited), part.losses.at(data.kept)
        share = float(edited.weights.sum() / part.losses.weights.sum())
        sample = drawn(kept, limit, seed).mixed(most_curved(edited, None, seed), share)
        return part.losses, self._objective([Source(data.loader, sample, data)], _whole([part]))

    def _held_out(
        self, limit: int | None, seed: int, loaders: list[IndexedLoader]
    ) -> tuple[Losses, Objective]:
        """Return the same with other data in place of the kept examples."""
        data, count = self.data, sum(loader.num_examples for loader in loaders)
        samples = limit is not None and count > limit
        training = self._measured(data.every_loader, data, False)
        own = self._measured(data.edited_loader, data, samples, data.edited)
        share = float(own.losses.weights.sum() / training.losses.weights.sum())
        edited = most_curved(own.losses, None, seed).times(share)
        sources, parts = [Source(data.loader, edited, data)], [own.times(share)]
        others = [self._measured(loader, None, samples) for loader in loaders]
        total = sum(float(part.losses.weights.sum()) for part in others)
        for part, loader in zip(others, loaders, strict=True):
            factor = (1 - share) * float(part.losses.weights.sum()) / total
            some = None if limit is None else math.ceil(limit * loader.num_examples / count)
            sources.append(Source(loader, drawn(part.losses, some, seed).times(factor)))
            parts.append(part.times(factor))
        return training.losses, self._objective(sources, _whole(parts))

    def _measured(
        self, loader: IndexedLoader, data: EditData | None, differentiates: bool, chosen: Tensor | None = None
    ) -> _Part:
        """Return the losses of some examples of a loader, or of all, and their gradient if it is needed."""
        if not differentiates:
            plain = LossPass(self.plan, data, chosen, curvature=True)
            self.runner.run(plain, [loader])
            return _Part(plain.result(), None)
        one_pass = DepartingPass(self.plan, data, self.weights, chosen)
        self.runner.run(one_pass, [loader])
        return _Part(one_pass.result(), one_pass.gradient)

    def _objective(self, sources: list[Source], whole: Whole | None) -> Objective:
        return Objective(self.runner, self.plan, self.weights, self.decay, sources, whole)


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


def _whole(parts: list[_Part]) -> Whole | None:
    """Return the value and the gradient of an objective; None if the gradient was not asked for."""
    value, gradient = 0.0, None
    for part in parts:
        if part.gradient is None:
            return None
        value += part.factor * part.losses.mean()
        term = part.gradient * (part.factor / float(part.losses.weights.sum()))
        gradient = term if gradient is None else gradient + term
    return None if gradient is None else Whole(value, gradient)
