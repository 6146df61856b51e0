"""The report of an edit: how it was computed, what it does, as facts, tables and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from typing_extensions import Self

from lightning_influence.results.report import charts
from lightning_influence.results.report.certificate import Sentence, build_certificate, say
from lightning_influence.results.report.page import read_options, write_page
from lightning_influence.results.report.sections import build_ranking, build_tables
from lightning_influence.support.fields import check_fields
from lightning_influence.support.storage import PathLike


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
        """Number of parameters of the layers that could change."""
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
        """Make a report of what :meth:`to_state` returned.

        Returns:
            An equal report.

        Raises:
            ValueError: if a value is missing or of a wrong type; names it.
        """
        values = dict(check_fields(cls, state, "report"))
        values["layers"] = {name: (pair[0], pair[1]) for name, pair in values["layers"].items()}
        for name in ("edited", "kept"):
            values[name] = LossChange(**values[name])
        return cls(**values)

    def __call__(
        self, path: PathLike, dataset: Any = None, *, examples: Iterable[int] = (), **options: Any
    ) -> Path:
        """Write the report as a page that opens in any browser, without a network.

        Args:
            path: the file, used as it stands; an existing one is replaced.
            dataset: the training examples: anything indexed by training dataset indices.
            examples: indices of the edited examples, to show them.
            **options: further fields of :class:`~lightning_influence.results.report.ReportOptions`, as in
                :meth:`Attributions.report <lightning_influence.Attributions.report>`.

        Returns:
            The path.

        Raises:
            ValueError: if the dataset has no entry of an index.
            TypeError: if an option is unknown or of a wrong type.
            ImportError: if Jinja2 is not installed.
        """
        material = read_options({"dataset": dataset, **options})
        edited = [int(index) for index in examples]
        done = "forgotten" if self.kind == "forget" else "relabelled"
        shown = build_ranking(material, "examples", f"Examples {done} ({len(edited):,})", "", edited, {})
        shares = {name: changed / total for name, (changed, total) in self.layers.items()}
        sections = [
            build_tables(
                "losses",
                "What it does",
                f"Mean loss of the examples to be {done} and of those to be kept, before the edit and with "
                "it. The first should change, the second stay.",
                [_as_rows(self.loss_table()), _as_rows(self.layer_table())],
            ),
            shown if edited else None,
            build_certificate(self._describe(done), self.facts()),
            charts.build_charts([
                charts.bars("Share of the parameters that change, by layer", "share", shares),
                *charts.spectrum_charts(material.options.spectrum),
            ]),
        ]
        lead = (
            f"{self.edited.examples:,} examples {done} by changing {self.touched:,} of the {self.numel:,} "
            "parameters that could change."
        )
        return write_page(path, material, f"Examples {done}", lead, sections)

    def _describe(self, done: str) -> list[Sentence]:
        good = self.kept.observed <= max(0.1 * abs(self.edited.observed), 0.01)
        return [
            say(
                f"The mean loss of the examples to be {done} went from {self.edited.before:.4g} to "
                f"{self.edited.after:.4g}, that of the others ({self.kept_origin} data) from "
                f"{self.kept.before:.4g} to {self.kept.after:.4g}.",
                "good" if good else "fair",
            ),
            say(
                f"The equations behind the change were solved up to {self.residual:.1%} (0% would be exact).",
                "good" if self.residual <= 0.1 else "fair",
            ),
            say(
                "An edit approximates training again without (or with other labels of) these examples; only "
                "training again would be exact."
            ),
            *(say(note, "fair") for note in self.notes),
        ]


def _as_rows(table: Table) -> tuple[str, list[str], list[list[Any]]]:
    columns = [str(column.header) for column in table.columns]
    cells = [list(column.cells) for column in table.columns]
    return str(table.title), columns, [list(map(str, row)) for row in zip(*cells, strict=True)]
