"""Tables and a JSON file of benchmark results."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
GROUPS = ("factors", "scores", "self-influence")
LIBRARIES = ("torch", "lightning", "kronfluence")


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def save(results: list[Result], path: Path) -> None:
    """Write results, with versions and threads, atomically.

    Args:
        results: of :func:`contender.measure`, as dictionaries.
        path: the JSON file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"versions": _versions(), "threads": torch.get_num_threads(), "results": results}
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def load(path: Path) -> dict[tuple[str, str], Result]:
    """Read results that :func:`save` wrote, by contender and task; none if there is no file."""
    if not path.exists():
        return {}
    results = json.loads(path.read_text("utf-8"))["results"]
    return {(result["contender"], result["task"]): result for result in results}


def _figure(value: float) -> str:
    """Return three digits, or whole numbers from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def total(result: Result, group: str) -> float:
    """Epochs that a contender spends in a group of stages; 0 if it has none."""
    return float(sum(stage["epochs"] for stage in result.get("stages", []) if stage["group"] == group))


def _stage_table(results: list[Result]) -> Table:
    first = results[0]
    title = (
        f"{first['task']}: {first['num_train']} examples, {first['num_queries']} queries, "
        f"one epoch {1e3 * first['epoch_seconds']:.1f} ms"
    )
    table = Table(title=title, caption="epochs: CPU seconds over those of one plain forward+backward epoch")
    for column in ("method", "stage"):
        table.add_column(column)
    for column in ("epochs", "floor", "seconds", "CPU s", "peak MiB", "examples run"):
        table.add_column(column, justify="right")
    for result in results:
        for row, stage in enumerate(result["stages"]):
            floor = stage["floor_epochs"]
            sizes = stage["sizes"]
            table.add_row(
                result["contender"] if row == 0 else "",
                stage["name"],
                _figure(stage["epochs"]),
                "" if floor is None else _figure(floor),
                _figure(stage["seconds"]),
                _figure(stage["cpu_seconds"]),
                f"{stage['peak_mib']:.0f}",
                "all" if len(sizes) == 1 else " and ".join(map(str, sizes)) + ", line",
            )
        table.add_section()
    return table


def _ratio(result: Result, reference: Result, group: str) -> str:
    own, other = total(result, group), total(reference, group)
    if not own:
        return "-"
    ratio = "" if result is reference or not other else f" ({other / own:.1f}x)"
    return f"{_figure(own)}{ratio}"


def _summary_table(results: list[Result]) -> Table:
    reference = next((r for r in results if r["contender"] == "kronfluence"), results[0])
    table = Table(
        title=f"{results[0]['task']}: totals",
        caption=f"(in brackets: times faster than {reference['contender']}; rho: ranks against converged CG)",
    )
    table.add_column("method")
    for column in (*GROUPS, "peak MiB", "LDS or rho", "95% interval", "untuned", "score error"):
        table.add_column(column, justify="right")
    for result in results:
        lds, error, rho = result["lds"], result["relative_error"], result.get("correlation")
        untuned = result.get("untuned")
        table.add_row(
            result["contender"],
            *[_ratio(result, reference, group) for group in GROUPS],
            f"{max((stage['peak_mib'] for stage in result['stages']), default=0):.0f}",
            f"{lds[0]:.3f}" if lds else "" if rho is None else f"{rho:.3f}",
            f"{lds[1]:.3f} to {lds[2]:.3f}" if lds else "",
            "" if untuned is None else f"{untuned:.3f}",
            f"{error:.1e}" if error is not None else "",
        )
    return table


def render(results: list[Result], console: Console | None = None) -> None:
    """Print the tables of one task.

    Args:
        results: of one task; those with an ``error`` are listed as such.
        console: where to print; the terminal by default.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = 120
    for failed in (r for r in results if "error" in r):
        console.print(f"[red]{failed['contender']} on {failed['task']} failed:[/] {failed['error']}")
    complete = [r for r in results if "error" not in r]
    if complete:
        console.print(_stage_table(complete), _summary_table(complete))
