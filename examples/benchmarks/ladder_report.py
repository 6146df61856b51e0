"""Tables, figures as JSON, and plots of the ladder study."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from decomposition import Comparison
from ladder_answers import AUTO
from ladder_beyond import Variant
from ladder_parts import Agreement, Cost
from ladder_rules import CLOSE, RuleRow
from ladder_scores import Row, Step, Target
from rich.table import Table


def _table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _damping(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.1e}"


def score_table(rows: list[Row], title: str) -> Table:
    """Every rung's LDS untuned, and at the best damping of its grid.

    Args:
        rows: of one ground truth.
        title: of the table.

    Returns:
        The table.
    """
    caption = "95% intervals over subsets; the best damping is chosen on the same ground truth"
    table = _table(title, ("rung", "LDS at auto", "best of grid", "damping", "refused at"), caption)
    for row in rows:
        refused = ", ".join(map(_damping, row.refused))
        table.add_row(
            row.rung, str(row.auto or "-"), str(row.best or "-"), _damping(row.best_damping), refused
        )
    return table


def grid_table(rows: list[Row], title: str) -> Table:
    """Every rung's LDS at every damping of its grid."""
    dampings = sorted({d for row in rows for d in row.grid if isinstance(d, float)})
    table = _table(title, ("rung", AUTO, *map(_damping, dampings)))
    for row in rows:
        values = (row.grid.get(damping) for damping in (AUTO, *dampings))
        table.add_row(row.rung, *("" if value is None else f"{value:.3f}" for value in values))
    return table


def step_table(steps: list[Step], title: str) -> Table:
    """What each step down the ladder costs."""
    caption = "share: of the fall from the Gauss-Newton matrix to K-FAC, each at its own best damping"
    columns = ("step", "drops", "each at its best", "same damping", "share")
    table = _table(title, columns, caption)
    for step in steps:
        share = "" if step.share is None else f"{step.share:.0%}"
        table.add_row(f"{step.above} -> {step.below}", step.drops, str(step.own), str(step.same), share)
    return table


def target_table(targets: dict[str, list[Target]]) -> Table:
    """Untuned ``auto`` against the exact matrix at its best damping, by task."""
    columns = ("task", "kept", "of", "auto", "exact, best", "at", "gap", "damping", "solver", "steps")
    caption = "gap = damping + solver: what auto's damping loses, and what its solver loses at that damping"
    table = _table("Untuned auto against the exact Gauss-Newton matrix", columns, caption)
    for task, rows in targets.items():
        for row in rows:
            parts = (f"{row.damping_part:+.3f}", f"{row.solver_part:+.3f}", str(row.steps))
            ends = (str(row.auto), str(row.exact), _damping(row.exact_damping), str(row.gap))
            table.add_row(task, f"{row.fraction:g}", row.measurement, *ends, *parts)
    return table


def multiples_table(targets: dict[str, list[Target]]) -> Table:
    """LDS of ``auto`` at multiples of its own damping, less that of the exact matrix at its best."""
    factors = max((rows[0].multiples for rows in targets.values()), key=len)
    table = _table(
        "auto at multiples of its own damping, less the exact matrix at its best",
        ("task", "kept", "of", *(f"x{factor:g}" for factor in factors)),
    )
    for task, rows in targets.items():
        for row in rows:
            differences = (f"{value - row.exact.value:+.3f}" for value in row.multiples.values())
            table.add_row(task, f"{row.fraction:g}", row.measurement, *differences)
    return table


def rule_table(rows: list[RuleRow], title: str) -> Table:
    """Every damping rule below the best damping, by ground truth."""
    best = (f"{row.best:.3f} {row.measurement} {row.fraction:g}" for row in rows)
    caption = f"close: within {CLOSE:g}; squared gradients over trace: {rows[0].r:.2f}"
    table = _table(title, ("rule", "close", "worst", *best), caption)
    for name in rows[0].gaps:
        gaps = [row.gaps[name] for row in rows]
        close = f"{sum(gap <= CLOSE for gap in gaps)}/{len(gaps)}"
        table.add_row(name, close, f"{max(gaps):.3f}", *(f"{gap:.3f}" for gap in gaps))
    return table


def comparison_table(pairs: dict[tuple[str, str], Comparison], title: str) -> Table:
    """Relative residuals and overlaps of approximations, layer by layer."""
    columns = ("approximation of truth", "layer", "residual", "eigenvalues", "eigenbasis (k)")
    table = _table(title, columns)
    for (truth, approximation), found in pairs.items():
        name = f"{approximation} of {truth}"
        table.add_row(name, "all", f"{found.residual:.3f}", f"off-block {found.off_block:.3f}", "")
        for layer in found.layers:
            basis = f"{layer.eigenbasis:.3f} ({layer.k})"
            table.add_row("", layer.name, f"{layer.residual:.3f}", f"{layer.eigenvalues:.3f}", basis)
        table.add_section()
    return table


def cost_table(rows: list[Cost], title: str) -> Table:
    """Passes, seconds and residuals of one answer from scratch."""
    columns = ("rung", "passes", "epochs", "products", "seconds", "CPU s", "residual mean, max", "note")
    table = _table(title, columns, "from a trained model without factors, all queries, damping auto")
    for row in rows:
        residual = "" if row.residual is None else f"{row.residual[0]:.1e}, {row.residual[1]:.1e}"
        products = "" if row.products is None else str(row.products)
        times = (f"{row.seconds:.2f}", f"{row.cpu_seconds:.2f}")
        table.add_row(
            row.rung, str(row.passes), f"{row.epochs:.1f}", products, *times, residual, row.note[:90]
        )
    return table


def agreement_table(rows: list[Agreement], title: str) -> Table:
    """Every rung against proximal Bregman responses."""
    columns = ("rung", "Pearson, removal", "Spearman, removal", "Pearson, derivative", "error, derivative")
    table = _table(title, columns, "mean over training examples of the correlation over queries")
    for row in rows:
        figures = (row.removal, row.removal_ranks, row.derivative)
        table.add_row(row.rung, *(f"{value:.4f}" for value in figures), f"{row.error:.2e}")
    return table


def variant_table(rows: list[Variant], title: str) -> Table:
    """Variants against untuned ``auto``."""
    table = _table(title, ("variant", "LDS", "above auto"), "paired over subsets, all at auto's damping")
    for row in rows:
        table.add_row(row.name, str(row.lds), str(row.gain))
    return table


def plain(value: Any) -> Any:
    """Return figures as JSON values: dataclasses as dictionaries, keys as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        joined = {("/".join(key) if isinstance(key, tuple) else str(key)): one for key, one in value.items()}
        return {key: plain(one) for key, one in joined.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def plot(rows: list[Row], title: str, path: Path) -> bool:
    """Draw LDS against damping, a line a rung; written atomically.

    Args:
        rows: of one ground truth.
        title: of the picture.
        path: a PNG file.

    Returns:
        Whether it was drawn: matplotlib is optional.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        points = sorted((d, lds) for d, lds in row.grid.items() if isinstance(d, float))
        if points:
            style = "-" if len(points) > 3 else "x--"
            axes.plot(*zip(*points, strict=True), style, label=row.rung)
        elif row.auto is not None:
            axes.axhline(row.auto.value, linestyle=":", color="grey", label=row.rung)
    axes.set_xscale("log")
    axes.set(title=title, xlabel="damping", ylabel="linear datamodeling score")
    axes.legend(fontsize="small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)
    return True
