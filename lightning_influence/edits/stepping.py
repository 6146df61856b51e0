"""Chooses the step of an edit: by theory, as given, or by evaluating the model along the direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_influence.edits.data import EditData
from lightning_influence.edits.line_search import Found, Point, search_forgetting, search_objective
from lightning_influence.edits.objective import Objective
from lightning_influence.edits.options import EditOptions
from lightning_influence.edits.passes import Losses, LossPass
from lightning_influence.edits.weights import Weights
from lightning_influence.errors import LossCaptureError, NonFiniteError
from lightning_influence.layers import LayerPlan
from lightning_influence.running.base import Runner
from lightning_influence.running.loaders import IndexedLoader


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
        objective: the training objective after a relabelling, which a search for it needs.
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

    def kept_loss(self, chosen: Tensor) -> float:
        """Return the mean loss on kept examples, or on the validation data if there is any."""
        if self._validation is None:
            return self.losses(chosen).mean()
        return self._run(LossPass(self._plan, None), self._validation).result().mean()

    def choose(
        self,
        start: Tensor,
        unit: Tensor,
        shares: tuple[float, float],
        *,
        precise: bool = True,
    ) -> Found:
        """Choose a multiple of a change.

        Args:
            start: change of the weights so far, ``(P,)``.
            unit: the theoretical step, ``(P,)``.
            shares: of the edited and the kept examples in the objective.
            precise: whether a search for the lowest objective goes on below powers of two.

        Returns:
            The step.

        Raises:
            LossCaptureError: if it is not known which loss counts as forgotten.
        """
        asked = self._options.step
        if asked != "search":
            return Found(1.0 if asked == "theory" else float(asked), True, 0)
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
                return self._excess() if forgets else self._objective(start + step * unit, shares)
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

    def _excess(self) -> Point:
        edited, given = self.losses(self._data.edited), self._options.forgotten_loss
        chance = edited.chance if given is None else given * edited.weights
        return Point(edited.values - chance, 0.0)

    def _objective(self, change: Tensor, shares: tuple[float, float]) -> Point:
        """Return the objective of a relabelling, its kept part from the validation data if there are any."""
        nothing = torch.zeros(0)
        if self._validation is None:
            assert self.objective is not None
            return Point(nothing, self.objective.value(change))
        edited, kept = self.losses(self._data.edited).mean(), self.kept_loss(self._data.kept)
        return Point(nothing, shares[0] * edited + shares[1] * kept)

    def _run(self, one_pass: LossPass, loaders: Any) -> LossPass:
        self._runner.run(one_pass, loaders)
        self._knows_chance &= one_pass.knows_chance
        return one_pass

    @property
    def searches_forgetting(self) -> bool:
        """Whether the step is the one at which the examples are forgotten."""
        return self._options.step == "search" and self._data.targets is None
