"""The tables of ``docs/benchmarks.md``, written from the JSON file of ``peers.py``.

    python examples/benchmarks/write_page.py [--json examples/benchmarks/.cache/results.json]

Everything between ``<!-- table: NAME -->`` and ``<!-- /table -->`` is replaced; the sentences around were
written by hand and should be read again. Methods and tasks that the file does not hold are left out.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from report import GROUPS, Result, total

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "benchmarks.md"
REFERENCE, OWN = "kronfluence", "ekfac"
# Titles of tasks and methods, in the order of the page.
TASKS = {
    "digits_mlp": "digits MLP",
    "digits_cnn": "digits CNN",
    "large_mlp": "MLP 784-1024-1024-10",
    "transformer": "character transformer",
}
METHODS = {
    "auto": "`auto`",
    "kfac": "`kfac`",
    "ekfac": "`ekfac`",
    "kronfluence": "kronfluence 1.0.1, EK-FAC, damping 1e-6",
}


def write_quality(results: list[Result]) -> str:
    """Make the table of linear datamodeling scores.

    Args:
        results: of ``peers.py``.

    Returns:
        Markdown: a row a method, a column a task that was scored against retraining.
    """
    found = {(r["contender"], r["task"]): r["lds"] for r in results if r.get("lds")}
    tasks = [task for task in TASKS if any(key[1] == task for key in found)]
    rows = []
    for method, title in METHODS.items():
        if any((method, task) in found for task in tasks):
            rows.append([title, *(_score(found.get((method, task))) for task in tasks)])
    return _table(["", *(TASKS[task] for task in tasks)], rows)


def write_cost(results: list[Result]) -> str:
    """Make the table of costs of ``ekfac``, beside those of the reference.

    Args:
        results: of ``peers.py``.

    Returns:
        Markdown: a row a task; epochs of each group of stages, and how many times less than the reference.
    """
    found = {(r["contender"], r["task"]): r for r in results if "error" not in r}
    rows = []
    for task, title in TASKS.items():
        own, other = found.get((OWN, task)), found.get((REFERENCE, task))
        if own is None or other is None:
            continue
        cells = [f"{title}, {own['num_train']:,} x {own['num_queries']}"]
        for group in GROUPS:
            epochs = total(own, group)
            cells.append(f"{_digits(epochs)} ({_digits(total(other, group) / epochs)}x)")
        rows.append([*cells, f"{_peak(own)} ({_peak(other)})"])
    return _table(["", *GROUPS, f"peak MiB ({REFERENCE})"], rows)


def write_page(page: str, results: list[Result]) -> str:
    """Put both tables into the page.

    Args:
        page: its text.
        results: of ``peers.py``.

    Returns:
        The new text.

    Raises:
        ValueError: if the page has no place for a table.
    """
    for name, table in (("quality", write_quality(results)), ("cost", write_cost(results))):
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- /table -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"The page has no '<!-- table: {name} -->' before a '<!-- /table -->'.")
        page = place.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", page, count=1)
    return page


def _score(lds: tuple[float, float, float] | None) -> str:
    if lds is None:
        return "-"
    score, low, high = (f"{value:.3f}".replace("0.", ".", 1) for value in lds)
    return f"{score} ({low} to {high})"


def _digits(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _peak(result: Result) -> str:
    return f"{max(stage['peak_mib'] for stage in result['stages']):.0f}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=HERE / ".cache" / "results.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text("utf-8"))["results"]
    arguments.page.write_text(write_page(arguments.page.read_text("utf-8"), results), "utf-8")
    print(f"wrote {arguments.page}")


if __name__ == "__main__":
    main()
