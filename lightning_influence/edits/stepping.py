"""Chooses the step of an edit: by theory, as given, or by evaluating the model along the direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.edits.data import EditData
from lightning_influence.edits.line_search import Found, Point, search_forgetting, search_objective
from lightning_influence.edits.objective import Objective
from lightning_influence.edits.options import EditOptions
from lightning_influence.edits.passes import Losses, LossPass
from lightning_influence.edits.weights import Weights
from lightning_influence.linalg.descent import shorten
from lightning_influence.model.plan import LayerPlan
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.runner import Runner
from lightning_influence.support.errors import InfluenceError, LossCaptureError, NonFiniteError

_MOST_SHORTENINGS = 8
# Relative differences of losses in single precision that mean nothing.
_NOISE = 1e-6


@dataclass(frozen=True)
class Outcome:
    """Mean losses at some weights, over all examples.

    Attributes:
        edited: of the edited examples, at their new targets if they have any.
        kept: of the kept ones, or of the validation data.
        share: of the edited examples in the weight of the training data.
        shrinkage: the term of the weight decay.
    """

    edited: float
    kept: float
    share: float
    shrinkage: float

    @property
    def objective(self) -> float:
        """The training objective after a relabelling."""
        return self.share * self.edited + (1 - self.share) * self.kept + self.shrinkage


class Stepping:
    """Evaluates a module along directions, and chooses steps.

    Args:
        runner: an entered runner on the module.
        plan: the covered layers.
        data: the examples.
        options: settings.
        weights: the covered weights.
        validation: loaders to measure the kept loss on in place of the kept examples; None without.

    Attributes:
        objective: the training objective after the edit, where steps depend on it.
    """

    def __init__(
        self,
        runner: Runner,
        plan: LayerPlan,
        data: EditData,
        options: EditOptions,
        weights: Weights,
        validation: list[IndexedLoader] | None,
    ) -> None:
        self._runner, self._plan, self._data, self._options = runner, plan, data, options
        self._weights, self._validation = weights, validation
        self.objective: Objective | None = None
        self._knows_chance = True

    def losses(self, chosen: Tensor | None = None, *, curvature: bool = False) -> Losses:
        """Return the losses of training examples, at their new targets if they have any.

        Args:
            chosen: their dataset indices; all examples if None.
            curvature: whether to measure the curvature in the outputs too.
        """
        one_pass = LossPass(self._plan, self._data, chosen, curvature=curvature)
        data = self._data
        if chosen is None:
            loader = data.every_loader
        else:
            loader = data.edited_loader if chosen is data.edited else data.subset(chosen)
        return self._run(one_pass, loader).result()

    def measure(self, share: float, known: Losses | None = None) -> Outcome:
        """Return the losses of all examples at the weights that the module has now.

        Args:
            share: of the edited examples in the weight of the training data.
            known: losses of the training examples at these weights.
        """
        data, validates = self._data, self._validation is not None
        losses = known or self.losses(data.edited if validates else None)
        if validates:
            kept = self._run(LossPass(self._plan, None), self._validation).result().mean()
        else:
            kept = losses.at(data.kept).mean()
        shrinkage = 0.0 if self.objective is None else self.objective.shrinkage()
        return Outcome(losses.at(data.edited).mean(), kept, share, shrinkage)

    def settle(self, change: Tensor, before: Outcome) -> tuple[float, Outcome]:
        """Shorten the change of a relabelling until its objective over all examples is not above the old one.

        Args:
            change: of the weights, ``(P,)``; the module keeps what is left of it.
            before: the losses without it.

        Returns:
            The share of the change that is left, and the losses with it.

        Raises:
            InfluenceError: if no share of it helps.
        """
        assert self.objective is not None
        share, slope = 1.0, self.objective.slope(change)
        for _ in range(_MOST_SHORTENINGS):
            self._weights.move(share * change)
            try:
                now = self.measure(before.share)
            except NonFiniteError:
                share *= 0.25
                continue
            if now.objective <= before.objective + _NOISE * abs(before.objective):
                return share, now
            share *= shorten(before.objective, slope, share, now.objective) if slope < 0 else 0.5
        raise InfluenceError(
            "The change that lowers the loss of a sample of the training set raises that of all of it. Pass "
            "curvature_examples=None, which measures every step on all examples, or try a larger ratio or "
            "damping."
        )

    def choose(self, start: Tensor, unit: Tensor, *, again: bool = False, precise: bool = True) -> Found:
        """Choose a multiple of a change.

        Args:
            start: change of the weights so far, ``(P,)``.
            unit: the theoretical step, ``(P,)``.
            again: whether a step was made before.
            precise: whether a search for the lowest objective goes on below powers of two.

        Returns:
            The step.

        Raises:
            LossCaptureError: if it is not known which loss counts as forgotten.
        """
        asked = self._options.step
        if asked != "search":
            step = 1.0 if asked == "theory" else float(asked)
            return self._lowering(start, unit, step) if again else Found(step, True, 0)
        forgets = self._data.targets is None
        if forgets and self._options.forgotten_loss is None and not self._knows_chance:
            raise LossCaptureError(
                "The outputs behind the module's `influence_loss` are not known, so neither is the loss of a "
                "model that knows nothing. Pass forgotten_loss= (the loss from which an example counts as "
                "forgotten), or step='theory'."
            )

        def evaluate(step: float) -> Point | None:
            self._weights.move(start + step * unit)
            try:
                return self._excess() if forgets else self._relabelled(start + step * unit)
            except NonFiniteError:
                return None
            finally:
                self._weights.move(start)

        if forgets:
            return search_forgetting(evaluate)
        now = evaluate(0.0)
        current = float("inf") if now is None else now.objective
        # A power of two will do where a descent follows.
        return search_objective(evaluate, current, reaches=(1.0, 0.5) if precise else ())

    def _lowering(self, start: Tensor, unit: Tensor, step: float) -> Found:
        """Return the step, halved until it lowers the objective, as a Newton step of a network need not."""
        assert self.objective is not None
        current = self.objective.value(start)
        for halvings in range(_MOST_SHORTENINGS):
            if self.objective.value(start + step * unit) < current:
                return Found(step, True, halvings + 1)
            step /= 2
        self._weights.move(start)
        return Found(0.0, False, _MOST_SHORTENINGS)

    def _excess(self) -> Point:
        edited, given = self.losses(self._data.edited), self._options.forgotten_loss
        chance = edited.chance if given is None else given * edited.weights
        return Point(edited.values - chance, 0.0)

    def _relabelled(self, change: Tensor) -> Point:
        assert self.objective is not None
        return Point(torch.zeros(0), self.objective.value(change))

    def _run(self, one_pass: LossPass, loaders: Any) -> LossPass:
        self._runner.run(one_pass, loaders)
        self._knows_chance &= one_pass.knows_chance
        return one_pass

    @property
    def searches_forgetting(self) -> bool:
        """Whether the step is the one at which the examples are forgotten."""
        return self._options.step == "search" and self._data.targets is None
