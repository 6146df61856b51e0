"""Computes an edit: passes, selection, direction, step, and the report of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.training_record import TrainingRecord
from lightning_influence.edits.covered_layers import covered_layers
from lightning_influence.edits.data import EditData
from lightning_influence.edits.departure import Departure
from lightning_influence.edits.directions import find_direction
from lightning_influence.edits.line_search import UNREACHED, Found
from lightning_influence.edits.linearised import Linearised
from lightning_influence.edits.options import EditOptions
from lightning_influence.edits.parameter_edit import EditReport, LossChange, ParameterEdit, changes_between
from lightning_influence.edits.passes import Losses
from lightning_influence.edits.rules import find_rule
from lightning_influence.edits.sampling import most_curved
from lightning_influence.edits.selection import Selection, select
from lightning_influence.edits.stepping import Outcome, Stepping
from lightning_influence.edits.weights import Weights
from lightning_influence.linalg.descent import descend
from lightning_influence.linalg.normal_equations import SubsetSolution
from lightning_influence.running.loaders import IndexedLoader
from lightning_influence.running.reading import prepare
from lightning_influence.running.runner import Runner
from lightning_influence.support.errors import InfluenceError, InfluenceWarning
from lightning_influence.support.notes import Notes

# Kept examples that a relabelling's objective is measured on, once it has set out from all.
OBJECTIVE_EXAMPLES = 128
# Relative fall of a relabelling's objective in three steps below which one is the last.
LEAST_FALL = 0.03


class Editor:
    """Computes edits of one module.

    Args:
        runner: an entered runner on the module.
        data: the training examples, split.
        options: settings.
        layers: names or patterns of the layers that may change.
        record: the training run, for its weight decay.
        validation: data to measure the kept loss on in place of the kept training examples.
    """

    def __init__(
        self,
        runner: Runner,
        data: EditData,
        options: EditOptions,
        *,
        layers: Sequence[str] | None = None,
        record: TrainingRecord | None = None,
        validation: Any = None,
    ) -> None:
        self._start = time.perf_counter()
        self._runner, self._data, self._options, self._notes = runner, data, options, Notes()
        relabels = data.targets is not None
        # Whether all linearisations after the first one are quasi-Newton steps.
        self._descends = relabels and options.step == "search"
        self._linearisations = options.most_linearisations(relabels)
        self._curvature_examples = options.most_examples(relabels)
        self._plan = covered_layers(runner, data, layers, self._notes)
        self._weights = Weights(self._plan.layers)
        self._validates = validation is not None
        loaders = prepare(validation) if self._validates else None
        self._stepping = Stepping(runner, self._plan, data, options, self._weights, loaders)
        recorded = None if self._stepping.searches_forgetting else record
        self._decay = self._weights.decay(options.weight_decay, recorded)
        self._before = self._depart(loaders)
        edited, kept = self._before.at(data.edited), self._before.at(data.kept)
        self._sums = float(edited.weights.sum()), float(kept.weights.sum())
        limit, seed = self._curvature_examples, options.seed
        self._samples = most_curved(edited, limit, seed), most_curved(kept, limit, seed)

    def _depart(self, held_out: list[IndexedLoader] | None) -> Losses:
        """Return the losses of all examples, and make the objective where one is needed."""
        options, stepping, searches = self._options, self._stepping, self._options.step == "search"
        where = Departure(self._runner, self._plan, self._data, self._weights, self._decay)
        if self._data.targets is None:
            losses = stepping.losses(curvature=True)
            if not searches and self._linearisations > 1:
                stepping.objective = where.forgetting(losses)
            return losses
        given = 0 if options.curvature_examples == "auto" else options.curvature_examples
        most = None if given is None else max(given, OBJECTIVE_EXAMPLES)
        losses, stepping.objective = where.relabelling(most, options.seed, held_out if searches else None)
        return losses

    def select(self) -> Selection:
        """Return the parameters that an edit may change."""
        return self._select(self._linearise(at_optimum=True))

    def direction(self) -> dict[str, Tensor]:
        """Return the change that the theoretical step makes, by parameter name."""
        linear = self._linearise(at_optimum=True)
        solve = self._solve(linear, self._select(linear))
        return self._weights.by_parameter(linear.scale * solve.vector)

    def edit(self) -> ParameterEdit:
        """Compute the edit; the module is as before afterwards.

        Returns:
            The edit, not applied.

        Raises:
            InfluenceError: if no step along the direction helps.
        """
        try:
            return self._edit()
        finally:
            self._weights.restore()

    def _edit(self) -> ParameterEdit:
        before = self._stepping.measure(self._sums[0] / sum(self._sums), self._before)
        originals = {name: p.detach().clone() for name, p in self._weights.parameters().items()}
        change = torch.zeros_like(self._decay)
        # A search minimises the objective as it is; the theory's step is for a model at its optimum.
        linear = first = self._linearise(at_optimum=self._options.step != "search", change=change)
        selection = self._select(linear)
        steps: list[float] = []
        solves: list[SubsetSolution] = []
        count, found = self._linearisations, Found(0.0, False, 0)
        for number in range(1 if self._descends else count):
            if number:
                linear = self._linearise(at_optimum=False, change=change, previous=linear)
                if not bool((linear.gradient * selection.flat().to(linear.gradient)).any()):
                    break
            solve = self._solve(linear, selection, again=number > 0)
            unit = linear.scale * solve.vector
            rough = self._descends and count > 1
            found = self._stepping.choose(change, unit, again=number > 0, precise=not rough)
            if found.step == 0.0 and not rough:
                break
            change = change + found.step * unit
            self._weights.move(change)
            steps.append(found.step)
            solves.append(solve)
            if self._stepping.searches_forgetting and found.reached:
                break
        if steps and self._descends and count > 1:
            change, lengths = self._descend(linear, change, selection, count - 1)
            steps += lengths
        if not any(steps):
            raise InfluenceError(
                "No step along the direction lowers the loss of the training set with its new targets. Try a "
                "larger ratio or damping, another rule, or step='theory'."
            )
        if self._stepping.searches_forgetting and not found.reached:
            self._notes.add(UNREACHED)
        change, after = self._settle(change, before)
        predicted = self._predict(first, change) if count == 1 else (None, None)
        report = EditReport(
            kind="forget" if self._data.targets is None else "relabel",
            method=self._options.method,
            rule=selection.rule if self._selects else "",
            ratio=self._options.ratio if self._selects else 1.0,
            layers=self._touched(selection),
            step=steps,
            scale=linear.scale,
            damping=linear.damping,
            residual=max(solve.residual for solve in solves),
            solver_steps=sum(solve.steps for solve in solves),
            norm=float(change.norm()),
            edited=LossChange(len(self._data.edited), before.edited, after.edited, predicted[0]),
            kept=LossChange(
                len(self._data.kept), before.kept, after.kept, None if self._validates else predicted[1]
            ),
            kept_origin="validation" if self._validates else "training",
            descended=self._descends and len(steps) > 1,
            seconds=time.perf_counter() - self._start,
            notes=self._concluded(before, after),
        )
        moved = {name: p.detach().clone() for name, p in self._weights.parameters().items()}
        return ParameterEdit(
            self._runner.module, changes_between(originals, moved, self._masks(selection)), report
        )

    def _settle(self, change: Tensor, before: Outcome) -> tuple[Tensor, Outcome]:
        """Return what is made of the change, and the losses with it; a search never ends above its start."""
        if not self._descends:
            return change, self._stepping.measure(before.share)
        share, after = self._stepping.settle(change, before)
        if share < 1:
            self._notes.add(
                f"The change as it was found raises the loss of the training set; {share:.1%} of it, which "
                "lowers the loss, is taken. curvature_examples=None measures every step on all examples."
            )
        return share * change, after

    def _predict(self, linear: Linearised, change: Tensor) -> tuple[float, float]:
        """Return what the first linearisation says of a change; the module is at the change afterwards."""
        self._weights.move(torch.zeros_like(change))
        predicted = linear.predict(change)
        self._weights.move(change)
        return predicted

    @property
    def _selects(self) -> bool:
        return find_direction(self._options.method).selects

    def _linearise(
        self, *, at_optimum: bool, change: Tensor | None = None, previous: Linearised | None = None
    ) -> Linearised:
        return Linearised(
            self._runner,
            self._plan,
            self._data,
            self._options,
            self._weights.flat(),
            torch.zeros_like(self._decay) if change is None else change,
            self._decay,
            self._stepping.objective,
            self._sums,
            self._samples,
            at_optimum,
            self._notes,
            previous,
        )

    def _select(self, linear: Linearised) -> Selection:
        if not self._selects:
            masks = {
                name: torch.ones(layer.shape, dtype=torch.bool) for name, layer in self._plan.layers.items()
            }
            return Selection(masks, "everything", 1.0)
        rule = find_rule(self._options.rule)
        return select(rule, linear.evidence(rule.source), self._options.ratio, self._options.seed)

    def _solve(self, linear: Linearised, selection: Selection, *, again: bool = False) -> SubsetSolution:
        """Return the vector of a linearisation.

        Generalized influence finds the change that disturbs nothing else, the second-order one counts what is
        removed. Once it is made, what is left is to minimise the objective over the parameters that may move.
        """
        problem = linear.problem(selection.flat())
        method = self._options.method
        if again and self._stepping.objective is not None:
            method = {"gif": "fif", "second_order": "if"}.get(method, method)
        solve = find_direction(method).function(problem)
        if solve.residual > max(0.1, self._options.tolerance):
            self._notes.add(
                f"The linear system of the edit was solved to a residual of {solve.residual:.2f} only, after "
                f"{solve.steps} iterations. Raise max_steps or the damping."
            )
        return solve

    def _descend(
        self, linear: Linearised, change: Tensor, selection: Selection, most: int
    ) -> tuple[Tensor, list[float]]:
        """Lower the objective of a relabelling over the selected parameters, from the first step on.

        Returns:
            The change and the share of each further step that was taken.
        """
        assert self._stepping.objective is not None
        descent = descend(
            self._stepping.objective,
            change,
            linear.problem(selection.flat()).inverse_diagonal,
            most=most,
            least_fall=LEAST_FALL,
            learned=[(torch.zeros_like(change), -linear.scale * linear.gradient)],
        )
        self._weights.move(descent.point)
        return descent.point, descent.lengths

    def _concluded(self, before: Outcome, after: Outcome) -> list[str]:
        """Return all notes, with a warning if the edit costs more than the bound or misses its aim."""
        rise, bound = after.kept - before.kept, self._options.kept_bound
        if not rise <= bound:
            self._warn(
                f"The edit raises the mean loss on the kept examples by {rise:.3g}, more than "
                f"kept_bound={bound:g}. It is not applied yet; after edit.apply(), edit.revert() brings the "
                "old weights back. A smaller step=, a larger damping= or another ratio= costs less."
            )
        if self._data.targets is not None and not after.objective <= before.objective:
            self._warn(
                "The edit raises the mean loss of relabelled and kept examples together, from "
                f"{before.objective:.4g} to {after.objective:.4g}. step='search' finds a step that lowers it."
            )
        return list(self._notes.messages)

    def _warn(self, message: str) -> None:
        self._notes.messages.append(message)
        warnings.warn(message, InfluenceWarning, stacklevel=6)

    def _masks(self, selection: Selection) -> dict[str, Tensor]:
        return {k: v > 0 for k, v in self._weights.by_parameter(selection.flat().float()).items()}

    def _touched(self, selection: Selection) -> dict[str, tuple[int, int]]:
        return {name: (int(mask.sum()), mask.numel()) for name, mask in selection.masks.items()}
