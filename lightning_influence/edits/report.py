"""What an edit did and what was predicted of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from rich.table import Table


@dataclass(frozen=True)
class LossChange:
    """Mean loss of a set of examples.

    Attributes:
        examples: how many.
        before: mean loss before the edit.
        after: mean loss with it, measured.
        predicted: the change that the linearised model predicts; None after several linearisations.
    """

    examples: int
    before: float
    after: float
    predicted: float | None = None

    @property
    def observed(self) -> float:
        """The change of the mean loss."""
        return self.after - self.before


@dataclass(frozen=True)
class EditReport:
    """How an edit was computed and what it does.

    Attributes:
        kind: ``"forget"`` or ``"relabel"``.
        method: name of the direction.
        rule: name of the selection rule; empty if all parameters may change.
        ratio: share of each layer's parameters that the rule was given.
        layers: by layer the number of parameters that change and that it has.
        step: multiples of the theoretical step, one for each linearisation; after the first of a searched
            relabelling, shares of quasi-Newton steps.
        scale: the theoretical step: the edited examples' weight over that of the others (``"forget"``) or of
            all (``"relabel"``).
        damping: what was added to the curvature.
        residual: of the linear system, the largest over the linearisations.
        solver_steps: iterations in all.
        norm: Euclidean norm of the change.
        edited: loss on the edited examples, at their new targets if they have any.
        kept: loss on the kept examples, or on the validation data.
        kept_origin: ``"training"`` or ``"validation"``.
        descended: whether the steps after the first are quasi-Newton steps.
        seconds: wall-clock time.
        notes: what was assumed or did not hold.
    """

    kind: str
    method: str
    rule: str
    ratio: float
    layers: Mapping[str, tuple[int, int]]
    step: list[float]
    scale: float
    damping: float
    residual: float
    solver_steps: int
    norm: float
    edited: LossChange
    kept: LossChange
    kept_origin: str = "training"
    descended: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def touched(self) -> int:
        """Number of parameters that change."""
        return sum(changed for changed, _ in self.layers.values())

    @property
    def numel(self) -> int:
        """Number of covered parameters."""
        return sum(total for _, total in self.layers.values())

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield names and values for a table."""
        how = f"{self.method}, rule {self.rule!r} at {self.ratio:.1%}" if self.rule else self.method
        yield "method", how
        steps = ", ".join(f"{step:.3g}" for step in self.step)
        if self.descended:
            further = f", then {len(self.step) - 1} quasi-Newton steps"
            yield "step", f"{self.step[0]:.3g} times the theoretical {self.scale:.3g}{further}"
        else:
            yield "step", f"{steps} times the theoretical {self.scale:.3g}"
        yield "change", f"{self.touched:,} of {self.numel:,} parameters, norm {self.norm:.3g}"
        yield "damping", f"{self.damping:.3g}"
        yield "residual", f"{self.residual:.2g} after {self.solver_steps} iterations"
        yield "seconds", f"{self.seconds:.2f}"
        for note in self.notes:
            yield "note", note

    def metrics(self) -> dict[str, float]:
        """Return the numbers for a logger."""
        numbers = {
            "parameters_changed": float(self.touched),
            "norm": self.norm,
            "damping": self.damping,
            "residual": self.residual,
            "linearisations": float(len(self.step)),
            "seconds": self.seconds,
        }
        for name, change in (("edited", self.edited), ("kept", self.kept)):
            numbers |= {f"loss_{name}_before": change.before, f"loss_{name}_after": change.after}
        return numbers

    def loss_table(self) -> Table:
        """Return the losses before and after, and what was predicted."""
        table = Table(title="Mean loss")
        for column in ("examples", "number", "before", "after", "change", "predicted"):
            table.add_column(column, justify="left" if column == "examples" else "right")
        edited = "forgotten" if self.kind == "forget" else "relabelled"
        rows = {edited: self.edited, f"kept ({self.kept_origin})": self.kept}
        for name, change in rows.items():
            predicted = "-" if change.predicted is None else f"{change.predicted:+.4g}"
            numbers = (f"{change.before:.4g}", f"{change.after:.4g}", f"{change.observed:+.4g}")
            table.add_row(name, str(change.examples), *numbers, predicted)
        return table

    def layer_table(self) -> Table:
        """Return how many parameters change in each layer."""
        table = Table(title="Parameters that change")
        for column in ("layer", "changed", "of", "share"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for name, (changed, total) in self.layers.items():
            table.add_row(name, f"{changed:,}", f"{total:,}", f"{changed / total:.1%}")
        return table

    def to_state(self) -> dict[str, Any]:
        """Return JSON values that :meth:`from_state` makes the report of again."""
        return {**dataclasses.asdict(self), "layers": {k: list(v) for k, v in self.layers.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the report that was stored."""
        values = dict(state)
        values["layers"] = {name: (pair[0], pair[1]) for name, pair in values["layers"].items()}
        for name in ("edited", "kept"):
            values[name] = LossChange(**values[name])
        return cls(**values)
