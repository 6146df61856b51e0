"""When to collect during a fit: a budget in units of training steps, spent over windows that double.

Nothing here looks at a clock. Costs are counted in operations, so that equal runs make equal decisions and a
resumed run makes those of the run it continues.

The run is cut into windows ``[T/2^j, T/2^(j-1))`` where ``T`` is its planned end (powers of two if that is
unknown). In each window covariances are summed first, one eigendecomposition follows, and the squares in its
basis are summed in the rest. Whenever training ends, the last finished window therefore covers at least the
part of the run between a quarter and a half of it, and at the planned end its last half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from typing_extensions import Self

Phase = Literal["covariances", "squares"]

# Work besides matrix products, in operations at the speed of those: what a training step costs before its
# products (6e7), what the optimizer does with a parameter (150), what a sum does with an entry of a matrix
# (150), and what a collected batch costs before its products (1.2e8). Measured on one CPU thread;
# examples/benchmarks/overhead.py measures the overhead that comes of them.
_STEP_OPERATIONS = 6e7
_UPDATE_OPERATIONS = 150.0
_ENTRY_OPERATIONS = 150.0
_COLLECT_OPERATIONS = 1.2e8
# Windows shorter than this many steps are not worth starting. Chosen by hand: one batch for covariances, one
# for squares, and a decomposition between them fill fewer.
_SHORTEST_WINDOW = 8
# Share of a window's budget that is spent where no eigendecomposition can be afforded yet: the rest is saved
# for it. Chosen by hand: a window then still has covariances of recent batches.
_SAVING_SHARE = 0.25
# The rest of the budget pays for hooks that run on every step. Chosen by hand.
_BUDGETED = 0.9
# Until the budget allows more, this many batches may be collected, so that short runs have factors at all.
# Chosen by hand.
_FIRST_BATCHES = 3


@dataclass(frozen=True)
class Costs:
    """What collecting costs, in training steps.

    Attributes:
        covariances: a batch whose covariances are summed.
        squares: a batch whose squares are summed.
        basis: one eigendecomposition of all layers.
    """

    covariances: float
    squares: float
    basis: float

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
            widths = [d for d, is_narrow in zip((d_out, d_in), narrow, strict=True) if not is_narrow]
            rows = float(groups * positions * examples)
            product = 2 * rows * d_out * d_in
            moments = 2 * rows * sum(d**2 for d in widths)
            dense = product + 2.0 * groups * examples * d_in * d_out * sum(widths)
            step += 3 * product
            covariances += product + moments + _ENTRY_OPERATIONS * groups * sum(d**2 for d in widths)
            squares += product + min(product + moments, dense) if positions > 1 else 2 * product + moments
            squares += 2 * _ENTRY_OPERATIONS * groups * d_in * d_out
            basis += groups * sum(9 * d**3 + 2000 * d**2 for d in widths)
        return cls(covariances / step, squares / step, basis / step)


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

    def note_costs(self, costs: Costs) -> None:
        """Take the costs of the model, once: they begin the first window."""
        if self.costs is None:
            self.costs = costs
            self.start, self.end = 0, self._boundary(self.steps)
            self._plan_phase("covariances")

    def restart(self, costs: Costs) -> None:
        """Begin the first window anew with other costs, those that several processes have agreed on."""
        self.costs, self.spent = None, 0.0
        self.note_costs(costs)

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
        """Return the schedule that was saved."""
        values = {f.name: state[f.name] for f in fields(cls)}
        if values["costs"] is not None:
            values["costs"] = Costs(**values["costs"])
        return cls(**values)

    def _earned(self, steps: int) -> float:
        assert self.costs is not None
        return max(_BUDGETED * self.overhead * steps, _FIRST_BATCHES * self.costs.covariances)

    def _boundary(self, step: int) -> int:
        """Return the end of the window that holds batch number ``step``."""
        unit = 1 << math.ceil(math.log2(max(step + 1, 1))) if self.horizon is None else self.horizon
        if step >= unit:  # past the planned end
            return 2 * step
        while unit // 2 > step and unit // 2 >= _SHORTEST_WINDOW:
            unit //= 2
        return max(unit, _SHORTEST_WINDOW) if self.horizon is None else unit

    def _plan_phase(self, phase: Phase) -> None:
        """Decide how many batches to collect until when."""
        assert self.costs is not None
        first = max(self.start, self.steps - 1)
        self.phase, self.phase_start, self.taken = phase, first, 0
        budget = max(0.0, self._earned(self.end) - self.spent)
        if phase == "squares":
            self.phase_end = self.end
            self.planned = self._affordable(budget, self.costs.squares, self.end - first)
            return
        batch = self.costs.covariances + self.costs.squares
        needed = self.costs.basis + batch
        if self.end != self.horizon:  # will be superseded: worth a small part of the budget only
            needed += 3 * self.costs.basis
        self.with_basis = self.every_n_steps is not None or budget >= needed
        # Half for covariances, half for squares. Where the basis cannot be afforded, its price is saved for.
        self.phase_end = (first + self.end + 1) // 2 if self.with_basis else self.end
        if self.with_basis:
            count = (budget - self.costs.basis) / batch
        else:
            count = _SAVING_SHARE * budget / self.costs.covariances
        self.planned = self._affordable(count, 1.0, self.phase_end - first)

    def _affordable(self, budget: float, cost: float, length: int) -> int:
        if self.every_n_steps is not None:
            return max(1, length // self.every_n_steps)
        return max(1, min(int(budget / cost), length))
