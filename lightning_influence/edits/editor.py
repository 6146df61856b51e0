"""Computes an edit from where it sets out: selection, direction, steps, and the report of it."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.edits.directions import Direction, find_direction
from lightning_influence.edits.edit_report import EditReport, LossChange
from lightning_influence.edits.linearisation import Linearisation
from lightning_influence.edits.parameter_edit import ParameterEdit, changes_between
from lightning_influence.edits.rules import Selection, find_rule, select
from lightning_influence.edits.start import Start
from lightning_influence.edits.steps import UNREACHED, Outcome, Stepping
from lightning_influence.linalg.descent import descend
from lightning_influence.linalg.normal_equations import SubsetSolution
from lightning_influence.support.errors import InfluenceError, InfluenceWarning

# Relative fall of a relabelling's objective in three steps below which one is the last. Chosen by hand.
LEAST_FALL = 0.03
# Relative residual above which an answer is named as rough; one that was asked for is not. Chosen by hand.
ROUGH_RESIDUAL = 0.1


def select_parameters(start: Start) -> Selection:
    """Return the parameters that an edit from here may change."""
    return _select(start, _linearise(start))


def predict_change(start: Start) -> dict[str, Tensor]:
    """Return the change that the theoretical step makes, by parameter name."""
    linear = _linearise(start)
    solve = _solve(start, linear, _select(start, linear), find_direction(start.options.method))
    return start.weights.by_parameter(start.scale * solve.vector)


def compute_edit(start: Start) -> ParameterEdit:
    """Compute an edit; the module is as before afterwards.

    Args:
        start: where the edit sets out.

    Returns:
        The edit, not applied.

    Raises:
        InfluenceError: if no step along the direction helps.
    """
    try:
        stepping, weights = Stepping(start), start.weights
        before = stepping.measure(first=True)
        originals = {name: p.detach().clone() for name, p in weights.parameters.items()}
        path = _go(start, stepping)
        change, after = _settle(start, stepping, path.change, before)
        predicted = _predict(start, path.first, change) if start.linearisations == 1 else (None, None)
        notes = _conclude(start, before, after)
        report = _make_report(start, path, change, (before, after), predicted, notes)
        moved = {name: p.detach().clone() for name, p in weights.parameters.items()}
        masks = {k: v != 0 for k, v in weights.by_parameter(path.selection.flat().float()).items()}
        return ParameterEdit(start.runner.module, changes_between(originals, moved, masks), report)
    finally:
        start.weights.restore()


@dataclass
class _Path:
    """The way from the start to an edit.

    Attributes:
        selection: the parameters that may change.
        change: of the weights, ``(P,)``.
        first: the linearisation at the start.
        last: the last linearisation.
        steps: multiples of the theoretical step, then shares of quasi-Newton steps.
        solves: of each linearisation's system.
    """

    selection: Selection
    change: Tensor
    first: Linearisation
    last: Linearisation
    steps: list[float] = field(default_factory=list)
    solves: list[SubsetSolution] = field(default_factory=list)


def _go(start: Start, stepping: Stepping) -> _Path:
    """Go step by step, as often as the model may be linearised.

    Returns:
        The way; the module is at its end.

    Raises:
        InfluenceError: if no step helps.
    """
    nothing = torch.zeros_like(start.weights.decay)
    # A search minimises the objective as it is; the theory's step is for a model at its optimum.
    linear = Linearisation(start, nothing, at_optimum=not start.searches)
    path = _Path(_select(start, linear), nothing, linear, linear)
    selected, direction = path.selection.flat(), find_direction(start.options.method)
    # A relabelling goes on from its first step by a descent, for which a rough one will do.
    goes_on = start.descends and start.linearisations > 1
    reached = False
    for number in range(1 if start.descends else start.linearisations):
        if number:
            path.last = linear = Linearisation(start, path.change, at_optimum=False, previous=linear)
            if not bool((linear.gradient * selected.to(linear.gradient)).any()):
                break
        again = number > 0
        solve = _solve(start, linear, path.selection, _find_further_direction(start) if again else direction)
        unit = start.scale * solve.vector
        found = stepping.choose(path.change, unit, again=again, precise=not goes_on)
        reached = found.reached
        if found.step == 0.0 and not goes_on:
            break
        path.change = path.change + found.step * unit
        start.weights.move(path.change)
        path.steps.append(found.step)
        path.solves.append(solve)
        if start.searches and start.forgets and reached:
            break
    if path.steps and goes_on:
        _descend(start, path)
    if not any(path.steps):
        raise InfluenceError(
            "No step along the direction lowers the loss of the training set with its new targets. Try a "
            "larger ratio or damping, another rule, or step='theory'."
        )
    if start.searches and start.forgets and not reached:
        start.notes.add(UNREACHED)
    return path


def _linearise(start: Start) -> Linearisation:
    """Return the linearisation that the theory's step is made of."""
    return Linearisation(start, torch.zeros_like(start.weights.decay), at_optimum=True)


def _select(start: Start, linear: Linearisation) -> Selection:
    options = start.options
    if not find_direction(options.method).selects:
        shapes = start.weights.layout.shapes
        masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
        return Selection(masks, "everything", 1.0)
    rule = find_rule(options.rule)
    return select(rule, linear.score(rule.source), options.ratio, options.seed)


def _solve(start: Start, linear: Linearisation, selection: Selection, direction: Direction) -> SubsetSolution:
    """Return the vector of a linearisation, with a note if it was not solved well.

    Raises:
        TypeError: if a direction of the user's own returns something else.
    """
    solve = direction.function(linear.pose(selection.flat()))
    if not isinstance(solve, SubsetSolution) or solve.vector.shape != linear.gradient.shape:
        raise TypeError(
            f"Direction {direction.name!r} returned {type(solve).__name__}; accepted is a SubsetSolution of "
            f"`lightning_influence.edits` whose vector has shape {tuple(linear.gradient.shape)}."
        )
    if solve.residual > max(ROUGH_RESIDUAL, start.options.tolerance):
        start.notes.add(
            f"The linear system of the edit was solved to a residual of {solve.residual:.2f} only, after "
            f"{solve.steps} iterations. Raise max_steps or the damping."
        )
    return solve


def _find_further_direction(start: Start) -> Direction:
    """Return the direction of the linearisations after the first.

    Generalized influence finds the change that disturbs nothing else, the second-order one counts what is
    removed. Once it is made, what is left is to minimise the objective over the parameters that may move.
    """
    method = start.options.method
    if start.objective is not None:
        method = {"gif": "fif", "second_order": "if"}.get(method, method)
    return find_direction(method)


def _descend(start: Start, path: _Path) -> None:
    """Lower the objective of a relabelling over the selected parameters, from the first step on."""
    assert start.objective is not None
    linear = path.last
    descent = descend(
        start.objective,
        path.change,
        linear.pose(path.selection.flat()).inverse_diagonal,
        most=start.linearisations - 1,
        least_fall=LEAST_FALL,
        learned=[(torch.zeros_like(path.change), -start.scale * linear.gradient)],
    )
    start.weights.move(descent.point)
    path.change = descent.point
    path.steps += descent.lengths


def _settle(start: Start, stepping: Stepping, change: Tensor, before: Outcome) -> tuple[Tensor, Outcome]:
    """Return what is made of the change, and the losses with it; a search never ends above its start."""
    if not start.descends:
        return change, stepping.measure()
    share, after = stepping.settle(change, before)
    if share < 1:
        start.notes.add(
            f"The change as it was found raises the loss of the training set; {share:.1%} of it, which "
            "lowers the loss, is taken. curvature_examples=None measures every step on all examples."
        )
    return share * change, after


def _predict(start: Start, linear: Linearisation, change: Tensor) -> tuple[float, float]:
    """Return what the first linearisation says of a change; the module is at the change afterwards."""
    start.weights.restore()
    predicted = linear.predict(change)
    start.weights.move(change)
    return predicted


def _conclude(start: Start, before: Outcome, after: Outcome) -> list[str]:
    """Return all notes, with a warning if the edit costs more than the bound or misses its aim."""
    warned, rise, bound = [], after.kept - before.kept, start.options.kept_bound
    if not rise <= bound:
        warned.append(
            f"The edit raises the mean loss on the kept examples by {rise:.3g}, more than "
            f"kept_bound={bound:g}. It is not applied yet; after edit.apply(), edit.revert() brings the "
            "old weights back. A smaller step=, a larger damping= or another ratio= costs less."
        )
    if not start.forgets and not after.objective <= before.objective:
        warned.append(
            "The edit raises the mean loss of relabelled and kept examples together, from "
            f"{before.objective:.4g} to {after.objective:.4g}. step='search' finds a step that lowers it."
        )
    for message in warned:  # at the line of the user's call: conclude, compute, ask, forget, user
        warnings.warn(message, InfluenceWarning, stacklevel=5)
    return [*start.notes.messages, *warned]


def _make_report(
    start: Start,
    path: _Path,
    change: Tensor,
    outcomes: tuple[Outcome, Outcome],
    predicted: tuple[float | None, float | None],
    notes: list[str],
) -> EditReport:
    (before, after), data, validates = outcomes, start.data, start.validation is not None
    return EditReport(
        kind="forget" if start.forgets else "relabel",
        method=start.options.method,
        rule=path.selection.rule if find_direction(start.options.method).selects else "",
        ratio=path.selection.ratio,
        layers={name: (int(mask.sum()), mask.numel()) for name, mask in path.selection.masks.items()},
        step=path.steps,
        scale=start.scale,
        damping=path.last.damping,
        residual=max(solve.residual for solve in path.solves),
        solver_steps=sum(solve.steps for solve in path.solves),
        norm=float(change.norm()),
        edited=LossChange(len(data.edited), before.edited, after.edited, predicted[0]),
        kept=LossChange(len(data.kept), before.kept, after.kept, None if validates else predicted[1]),
        kept_origin="validation" if validates else "training",
        descended=start.descends and len(path.steps) > 1,
        seconds=time.perf_counter() - start.began,
        notes=notes,
    )
