"""When to collect during a fit: a budget in units of training steps, spent over windows that double.

Costs are counted in operations at first. Counts are not to be trusted on every machine: at the end of each
phase whoever collects compares them with what the clock says, and corrects them (:meth:`Schedule.correct`).
Nothing here looks at a clock itself, so that a resumed run goes on with the costs of the run it continues. So
that equal runs make equal decisions although clocks differ, small differences correct nothing, and how many
batches a phase collects is a power of two times what is enough.

The run is cut into windows. The last one is the last eighth of the run, or what holds enough batches, because
weights move and factors should be those of the weights at its end; the windows before it end where it begins,
at half of that and so on (at powers of two if the end is unknown). In each window covariances are summed
first, one eigendecomposition follows, and the squares in its basis are summed in the rest, unless the budget
pays for too few examples: eigenvalues that stand for a few batches would be worse than none, since those that
are missing are measured on all examples when a question is asked.

Windows that end before the run does matter only if it is stopped early, and most of the budget is saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from typing_extensions import Self

from lightning_influence.curvature.factors import ENOUGH_EXAMPLES, Phase
from lightning_influence.curvature.thinning import count_rows, count_sums

# Work besides matrix products, in operations at the speed of those: what a training step costs before its
# products (6e7), and hooks in it whether it is collected or not (2e6); what the optimizer does with a
# parameter (150); what a sum does with an entry of a matrix (150); what collecting does in Python for a batch
# (8e7) and for a layer (3e7). Where layers have positions, what lies between them (attention, normalisation,
# activations) is counted by the entries of their inputs and outputs: in a step (800), and in one more
# backward pass, or in putting gradients together (300). Measured on one CPU thread on small MLPs, CNNs and
# transformers; examples/benchmarks/overhead.py and fit_factors.py measure the overhead that comes of them.
_STEP_OPERATIONS = 6e7
_UPDATE_OPERATIONS = 150.0
_ENTRY_OPERATIONS = 150.0
_HOOKS_OPERATIONS, _COLLECT_OPERATIONS, _LAYER_OPERATIONS = 2e6, 8e7, 3e7
_STEP_BETWEEN, _COLLECT_BETWEEN = 800.0, 300.0
# Windows shorter than this many steps are not worth starting. Chosen by hand: one batch for covariances, one
# for squares, and a decomposition between them fill fewer.
_SHORTEST_WINDOW = 8
# Share of what a window may spend that it does spend where it ends before the run, unless the last one needs
# it. Chosen by hand: the window that counts then has nearly all, and a run that is stopped early factors of
# recent batches, if only of one in every window.
_EARLY_SHARE = 1 / 4
# Share of the run that its last window covers. Chosen by hand: on small transformers trained with a constant
# learning rate, scores from all batches of the last half are further from refitted ones than scores from 500
# examples of the last tenth, which are as close as a second refit with other draws.
_LAST_SHARE = 1 / 8
# More examples than these are not collected in a window, whatever the budget pays for. Chosen by hand.
_MOST_EXAMPLES = 8_000
# A window collects enough examples, or this share of those that the run has seen if that is less. Chosen by
# hand.
_ENOUGH_SHARE = 0.1
# Shares of the budget for batches: the first, less what hooks take on every step, but no less than the
# second. The rest pays for what is slower because hooks run between. Chosen by hand.
_BUDGETED, _LEFT = 0.85, 0.2
# Until the budget allows more, this many batches may be collected, so that short runs have factors at all.
# Chosen by hand.
_FIRST_BATCHES = 3
# Counted costs are corrected where measured ones differ by more than this factor. Chosen by hand: clocks are
# off by as much.
_TOLERATED = 1.1


@dataclass(frozen=True)
class Costs:
    """What collecting costs, in training steps.

    Attributes:
        covariances: a batch whose covariances are summed.
        squares: a batch whose squares are summed.
        basis: one eigendecomposition of all layers.
        hooks: what runs on every step.
    """

    covariances: float
    squares: float
    basis: float
    hooks: float = 0.0

    @classmethod
    def count(
        cls,
        shapes: Sequence[tuple[int, int, int, int]],
        examples: int,
        parameters: int,
        diagonal: Sequence[tuple[bool, bool]] | None = None,
    ) -> Costs:
        """Count operations for one batch.

        Args:
            shapes: ``(G, R, D_out, D_in)`` of each covered layer.
            examples: ``B``.
            parameters: trainable parameters of the whole model.
            diagonal: of which sides of each layer, outputs and inputs, only the diagonal is held; of none if
                None.

        Returns:
            The costs. A decomposition of ``d`` by ``d`` takes the time of ``9 d^3 + 2000 d^2`` operations
            in matrix products (measured from 33 to 1025).
        """
        step = _STEP_OPERATIONS + _UPDATE_OPERATIONS * parameters
        covariances = squares = _COLLECT_OPERATIONS
        basis = 0.0
        sides = diagonal or [(False, False)] * len(shapes)
        for (groups, positions, d_out, d_in), narrow in zip(shapes, sides, strict=True):
            widths = [0 if is_narrow else d for d, is_narrow in zip((d_out, d_in), narrow, strict=True)]
            wide = sum(d**2 for d in widths)
            rows = positions * examples
            product = 2.0 * groups * rows * d_out * d_in
            between = float(groups * rows * (d_in + d_out)) if positions > 1 else 0.0
            step += 3 * product + _STEP_BETWEEN * between
            backward = _LAYER_OPERATIONS + product + _COLLECT_BETWEEN * between
            kept_in, kept_out = (count_rows(rows, examples, *pair) for pair in ((d_in, d_out), (d_out, d_in)))
            covariances += backward + 2.0 * groups * (kept_in * widths[1] ** 2 + kept_out * widths[0] ** 2)
            covariances += _ENTRY_OPERATIONS * groups * wide
            sums = count_sums(examples, positions)
            factored = 2.0 * groups * rows * wide + product
            dense = product + 2.0 * groups * sums * d_in * d_out * sum(widths)
            squares += backward + (min(factored, dense) if positions > 1 else factored)
            squares += 2 * _ENTRY_OPERATIONS * groups * d_in * d_out + _COLLECT_BETWEEN * between
            basis += groups * sum(9 * d**3 + 2000 * d**2 for d in widths)
        return cls(covariances / step, squares / step, basis / step, _HOOKS_OPERATIONS / step)

    def scaled(self, factor: float) -> Costs:
        """Return the costs of collecting times a number."""
        return Costs(factor * self.covariances, factor * self.squares, factor * self.basis, self.hooks)


@dataclass
class Schedule:
    """Decides, step by step, which batches are collected and what is summed.

    Attributes:
        overhead: share of the training steps that collecting may cost.
        every_n_steps: collect every n-th batch whatever it costs; None to keep to ``overhead``.
        horizon: planned number of batches of the run, None if unknown.
        costs: known after the first collected batch.
        steps: batches seen so far.
        spent: cost so far, in steps.
        start: first batch of the current window.
        end: the batch after its last.
        phase: what is summed now.
        phase_start: first batch of the phase.
        phase_end: the batch after its planned last.
        planned: how many batches to collect in this phase.
        taken: how many were.
        with_basis: whether this window has an eigendecomposition.
        batch: examples of a batch, of all processes; 0 if unknown.
    """

    overhead: float = 0.05
    every_n_steps: int | None = None
    horizon: int | None = None
    costs: Costs | None = None
    steps: int = 0
    spent: float = 0.0
    start: int = 0
    end: int = 0
    phase: Phase = "covariances"
    phase_start: int = 0
    phase_end: int = 0
    planned: int = 1
    taken: int = 0
    with_basis: bool = False
    batch: int = 0

    @property
    def credit(self) -> float:
        """What may be spent now, in steps."""
        if self.costs is None:
            return 0.0
        return self._earned(self.steps) - self.spent

    def set_horizon(self, horizon: int | None) -> None:
        """Set the planned end of the run, in batches; the same end changes nothing."""
        if horizon == self.horizon:
            return
        self.horizon = horizon
        if self.costs is not None and self.steps < self.end:  # a finished window stays what it is
            self.end = self._boundary(self.steps)
            self._plan_phase(self.phase)

    def should_collect(self) -> bool:
        """Return whether to collect the batch that was counted last."""
        if self.costs is None:
            return True
        if self.every_n_steps is not None:
            return (self.steps - 1) % self.every_n_steps == 0
        cost = self.costs.covariances if self.phase == "covariances" else self.costs.squares
        length = max(1, self.phase_end - self.phase_start)
        due = self.planned * min(1.0, (self.steps - self.phase_start) / length)
        return self.taken + 1 <= math.ceil(due) and self.taken < self.planned and self.credit >= cost

    def starts_window(self) -> bool:
        """Return whether the batch just counted is past the window's end; a new window then begins."""
        if self.costs is None or self.steps <= self.end:
            return False
        self.start, self.end = self.steps - 1, self._boundary(self.steps - 1)
        self._plan_phase("covariances")
        return True

    def wants_basis(self) -> bool:
        """Return whether it is time to decompose the covariances of this window."""
        if self.costs is None or self.phase != "covariances" or not self.with_basis or not self.taken:
            return False
        return self.steps >= self.phase_end and (
            self.every_n_steps is not None or self.credit >= self.costs.basis
        )

    def note_costs(self, costs: Costs, batch: int = 0) -> None:
        """Take the costs of the model, once: they begin the first window.

        Args:
            costs: as counted.
            batch: examples of a batch, of all processes; 0 if unknown.
        """
        if self.costs is None:
            self.costs, self.batch = costs, batch
            self.start, self.end = 0, self._boundary(self.steps)
            self._plan_phase("covariances")

    def restart(self, costs: Costs, batch: int = 0) -> None:
        """Begin the first window anew with other costs, those that several processes have agreed on."""
        self.costs, self.spent = None, 0.0
        self.note_costs(costs, batch)

    def correct(self, factor: float) -> None:
        """Take in that collecting costs more or less than was counted, and has so far.

        Args:
            factor: measured over counted costs; small differences change nothing.
        """
        if self.costs is not None and not 1 / _TOLERATED < factor < _TOLERATED:
            self.costs, self.spent = self.costs.scaled(factor), factor * self.spent
            if not self.taken:  # the plan of what begins now rests on them
                self._plan_phase(self.phase)

    def note_collected(self, extra: float = 0.0) -> None:
        """Count a batch as collected in the current phase, plus an extra cost in steps."""
        assert self.costs is not None
        self.taken += 1
        cost = self.costs.covariances if self.phase == "covariances" else self.costs.squares
        self.spent += cost + extra

    def note_basis(self) -> None:
        """Count the eigendecomposition; squares are summed from here on."""
        assert self.costs is not None
        self.spent += self.costs.basis
        self._plan_phase("squares")

    def state_dict(self) -> dict[str, Any]:
        """Return the state as primitives."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """Return the schedule that was saved; what an older version did not save is unknown."""
        values = {f.name: state[f.name] for f in fields(cls) if f.name in state}
        if values["costs"] is not None:
            values["costs"] = Costs(**values["costs"])
        return cls(**values)

    def _earned(self, steps: int) -> float:
        assert self.costs is not None
        share = max(_BUDGETED * self.overhead - self.costs.hooks, _LEFT * self.overhead)
        return max(share * steps, _FIRST_BATCHES * self.costs.covariances)

    def _boundary(self, step: int) -> int:
        """Return the end of the window that holds batch number ``step``."""
        horizon = self.horizon
        if horizon is None:
            return max(1 << math.ceil(math.log2(max(step + 1, 1))), _SHORTEST_WINDOW)
        if step >= horizon:  # past the planned end
            return 2 * step
        last = max(_LAST_SHARE * horizon, 2 * self._count_enough(horizon) + 2, _SHORTEST_WINDOW)
        end = horizon - math.ceil(last)
        if step >= end or end < _SHORTEST_WINDOW:
            return horizon
        while end // 2 > step and end // 2 >= _SHORTEST_WINDOW:
            end //= 2
        return end

    def _plan_phase(self, phase: Phase) -> None:
        """Decide how many batches to collect until when."""
        assert self.costs is not None
        first = max(self.start, self.steps - 1)
        self.phase, self.phase_start, self.taken = phase, first, 0
        budget = max(0.0, self._earned(self.end) - self.spent)
        if self.horizon is not None and self.end < self.horizon:
            budget = min(_EARLY_SHARE * budget, self._count_spare(self.horizon))
        if phase == "squares":
            self.phase_end = self.end
            self.planned = self._affordable(budget / self.costs.squares, self.end - first)
            return
        enough = self._count_enough(self.end)
        squares = enough / 2 * self.costs.squares
        self.with_basis = self.every_n_steps is not None or (
            budget >= self.costs.basis + enough * self.costs.covariances + squares
        )
        if not self.with_basis:
            self.phase_end = self.end
            self.planned = self._affordable(budget / self.costs.covariances, self.end - first)
            return
        # Half for covariances and half for squares, whose batches are as many, or fewer where all are few.
        self.phase_end = (first + self.end + 1) // 2
        left = budget - self.costs.basis
        both = left / (self.costs.covariances + self.costs.squares)
        self.planned = self._affordable(max(both, enough), self.phase_end - first)

    def _count_spare(self, horizon: int) -> float:
        """Return what the run's last window will not need, in steps."""
        assert self.costs is not None
        needed = self._count_enough(horizon) * self.costs.covariances
        return max(0.0, self._earned(horizon) - self.spent - needed)

    def _count_enough(self, steps: int) -> int:
        """Return of how many batches covariances should be after so many steps."""
        return math.ceil(min(ENOUGH_EXAMPLES / self.batch, _ENOUGH_SHARE * steps)) if self.batch else 1

    def _affordable(self, count: float, length: int) -> int:
        """Return how many batches to collect in so many steps, of those that the budget pays for."""
        if self.every_n_steps is not None:
            return max(1, length // self.every_n_steps)
        enough = self._count_enough(self.end)
        if self.batch and enough <= count:
            doublings = math.floor(math.log2(min(count / enough, _MOST_EXAMPLES / ENOUGH_EXAMPLES)))
            count = enough * 2**doublings
        return max(1, min(int(count), length))
