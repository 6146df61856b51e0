"""The tables of ``docs/benchmarks.md``, written from the JSON files of ``peers.py`` and ``large_auto.py``.

    python examples/benchmarks/write_page.py [--json examples/benchmarks/.cache/results.json]

What the file holds replaces the same method on the same task in ``measured.json``, which is kept beside this
script and is what the page is made of. Everything between ``<!-- table: NAME -->`` and ``<!-- /table -->`` is
replaced; the sentences around were written by hand and should be read again.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from report import GROUPS, Result, total

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "benchmarks.md"
MEASURED = HERE / "measured.json"
KEPT = ("contender", "task", "num_train", "num_queries", "lds", "correlation", "untuned", "error")
REFERENCE, OWN = "kronfluence", "ekfac"
# Titles of tasks and methods, in the order of the page.
TASKS = {
    "digits_mlp": "digits MLP",
    "digits_cnn": "digits CNN",
    "large_mlp": "MLP 784-1024-1024-10",
    "transformer": "character transformer",
    "resnet10": "ResNet of 1.2 M, 32 x 32",
    "language_small": "language model of 1.3 M",
    "resnet18": "ResNet-18, 32 x 32",
    "language": "language model of 10.6 M",
}
# Of ``large_auto.py``, whose figures have a table of their own.
LLAMAS = {
    "llama64": "64 x 2, 1,000 words",
    "llama128": "128 x 4, 1,000 words",
    "llama128_2000": "128 x 4, 2,000 words",
}
PEERS = {"kronfluence", "bergson", "bergson-cg", "dattri-llm", "dattri-ekfac", "dattri-cg", "dattri-logra"}
METHODS = {
    "auto": "`auto`",
    "kfac": "`kfac`",
    "ekfac": "`ekfac`",
    "ekfac-layers": "`ekfac`, linear and convolutional layers alone",
    "kronfluence": "kronfluence 1.0.1, EK-FAC, damping 1e-6",
    "bergson": "bergson 2.5.1, EK-FAC",
    "bergson-cg": "bergson 2.5.1, EK-FAC + CG",
    "dattri-llm": "dattri-llm 0.1.0, EK-FAC",
    "dattri-ekfac": "dattri 0.3.0, EK-FAC",
    "dattri-cg": "dattri 0.3.0, CG on the Hessian",
    "dattri-logra": "dattri 0.3.0, LoGra",
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


def write_llamas(results: list[Result]) -> str:
    """Make the table of what ``ekfac`` costs small Llamas.

    Args:
        results: of ``large_auto.py``.

    Returns:
        Markdown: a row a model; epochs of the factors, of eigendecompositions and of the scores.
    """
    found = {r["task"]: r for r in results if r["contender"] == OWN}
    rows = []
    for task, title in LLAMAS.items():
        if task in found:
            epochs = {stage["group"]: stage["epochs"] for stage in found[task]["stages"]}
            both = epochs["factors"] + epochs["scores"]
            cells = [f"{value:.1f}" for value in (epochs["factors"], epochs["scores"], both)]
            rows.append([title, *cells, f"{epochs['eigendecompositions']:.1f}"])
    return _table(["", "factors", "scores", "both", "eigendecompositions"], rows)


def write_peers(results: list[Result]) -> str:
    """Make the table of everything that was measured: costs and quality by task and method.

    Args:
        results: of ``peers.py``.

    Returns:
        Markdown: a row a method on a task. A peer's figure is bold where it is better than that of ``ekfac``,
        and in quality where it is better than that of ``auto``.
    """
    found = {(r["contender"], r["task"]): r for r in results}
    rows = []
    for task, title in TASKS.items():
        for method, name in METHODS.items():
            result = found.get((method, task))
            if result is None:
                continue
            if "error" in result:
                rows.append([title, name, result["error"], "", "", "", "", ""])
            else:
                own, best = found.get((OWN, task)), found.get(("auto", task))
                rows.append([title, name, *_figures(result, own, best)])
            title = ""
    return _table(["", "", *GROUPS, "peak MiB", "LDS or rho", "at its defaults"], rows)


def _figures(result: Result, own: Result | None, best: Result | None) -> list[str]:
    """Return a method's cells: epochs of each group, peak memory, quality, quality untuned."""
    peer = result["contender"] in PEERS
    cells = []
    for group in GROUPS:
        epochs, ours = total(result, group), total(own, group) if own and "error" not in own else 0.0
        cells.append(_bold(_digits(epochs), peer and 0 < epochs < ours) if epochs else "-")
    peak, ours = _most(result), _most(own) if own and "error" not in own else 0.0
    cells.append(_bold(f"{peak:.0f}", peer and peak < ours) if result.get("stages") else "-")
    quality, ours = _worth(result), _worth(best) if best else None
    ahead = peer and quality is not None and ours is not None and quality > ours
    cells.append("-" if quality is None else _bold(_short(quality), ahead))
    untuned = result.get("untuned")
    return [*cells, "-" if untuned is None else _short(untuned)]


def _worth(result: Result) -> float | None:
    lds = result.get("lds")
    value: float | None = lds[0] if lds else result.get("correlation")
    return value


def _most(result: Result) -> float:
    return float(max((stage["peak_mib"] for stage in result.get("stages", [])), default=0.0))


def _bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def join(kept: list[Result], new: list[Result]) -> list[Result]:
    """Replace what was measured again, and keep of it what the page needs.

    Args:
        kept: earlier results, in this form.
        new: results of ``peers.py``.

    Returns:
        All of them.
    """
    found = {(r["contender"], r["task"]): r for r in kept}
    for result in new:
        trimmed = {key: result[key] for key in KEPT if result.get(key) is not None}
        stages = [
            {"group": s["group"], "epochs": float(f"{s['epochs']:.4g}"), "peak_mib": round(s["peak_mib"])}
            for s in result.get("stages", [])
        ]
        found[result["contender"], result["task"]] = {**trimmed, **({"stages": stages} if stages else {})}
    return list(found.values())


def write_page(page: str, results: list[Result]) -> str:
    """Put the tables into the page.

    Args:
        page: its text.
        results: of ``peers.py``.

    Returns:
        The new text.

    Raises:
        ValueError: if the page has no place for a table.
    """
    tables = {"quality": write_quality, "cost": write_cost, "peers": write_peers, "llamas": write_llamas}
    for name, write in tables.items():
        table = write(results)
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- /table -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"The page has no '<!-- table: {name} -->' before a '<!-- /table -->'.")
        page = place.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", page, count=1)
    return page


def _score(lds: tuple[float, float, float] | None) -> str:
    if lds is None:
        return "-"
    score, low, high = map(_short, lds)
    return f"{score} ({low} to {high})"


def _digits(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _peak(result: Result) -> str:
    return f"{_most(result):.0f}"


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
    kept, new = (json.loads(path.read_text("utf-8")) for path in (MEASURED, arguments.json))
    results = join(kept, new["results"])
    MEASURED.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n", "utf-8")
    arguments.page.write_text(write_page(arguments.page.read_text("utf-8"), results), "utf-8")
    print(f"wrote {arguments.page}")


if __name__ == "__main__":
    main()
