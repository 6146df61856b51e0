"""Sections of a report that show examples: queries with what influenced them, and rankings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_influence.results.ranking import Ranking
from lightning_influence.results.rendering import describe_group
from lightning_influence.results.report.material import Material

Section = dict[str, Any]


def build_queries(
    material: Material, top: Ranking, bottom: Ranking, measurement: str, residuals: Tensor | None
) -> Section:
    """Each query beside the training examples at both ends of its ranking.

    Args:
        material: where examples come from.
        top: the highest scores.
        bottom: the lowest scores, of the same queries.
        measurement: what was measured on them.
        residuals: ``(Q,)``, or None.

    Returns:
        The section.
    """
    assert top.query_indices is not None
    loaders = None if top.query_dataloaders is None else top.query_dataloaders.tolist()
    rows = []
    for row, index in enumerate(top.query_indices.tolist()):
        if top.query_counts is not None:
            count = int(top.query_counts[row])
            name = describe_group(top.query_names[row], count, mark=": ", what=" queries")
            key = material.group(f"query-{index}", index, name)
        else:
            key = material.query(index, None if loaders is None else loaders[row])
        entry: dict[str, Any] = {"query": key}
        for name, ranking in (("top", top), ("bottom", bottom)):
            pairs = zip(ranking.indices[row].tolist(), ranking.scores[row].tolist(), strict=True)
            names = ranking.train_names
            entry[name] = [
                [material.group(f"train-{n}", n, names[n]) if names else material.train(n), score]
                for n, score in pairs
            ]
        if residuals is not None:
            entry["residual"] = float(residuals[row])
        rows.append(entry)
    return {
        "kind": "queries",
        "id": "queries",
        "title": f"Queries ({len(rows):,})",
        "lead": _explain(measurement),
        "words": _word(measurement),
        "rows": rows,
    }


def build_ranking(
    material: Material,
    section: str,
    title: str,
    lead: str,
    indices: Sequence[int],
    columns: dict[str, Sequence[float | None]],
    reasons: Sequence[Sequence[str]] | None = None,
) -> Section:
    """Training examples in order, with numbers and reasons.

    Args:
        material: where examples come from.
        section: name of the section, for links.
        title: its title.
        lead: what it shows.
        indices: dataset indices, the first in rank first.
        columns: numbers by name, one for each example; the first are drawn as bars too.
        reasons: texts for each example.

    Returns:
        The section.
    """
    rows = [
        {
            "example": material.train(index),
            "values": [values[place] for values in columns.values()],
            "reasons": [] if reasons is None else list(reasons[place]),
        }
        for place, index in enumerate(indices)
    ]
    return {
        "kind": "ranking",
        "id": section,
        "title": title,
        "lead": lead,
        "columns": list(columns),
        "rows": rows,
    }


def build_map(
    section: str,
    title: str,
    lead: str,
    axes: tuple[str, str],
    points: Sequence[tuple[int, float, float, int]],
    shades: Sequence[str],
) -> Section:
    """A map of training examples by two numbers.

    Args:
        section: name of the section, for links.
        title: its title.
        lead: what it shows.
        axes: what the numbers are, across and up.
        points: dataset index, the two numbers, and the number of the shade.
        shades: what the shades mean.

    Returns:
        The section.
    """
    return {
        "kind": "map",
        "id": section,
        "title": title,
        "lead": lead,
        "axes": list(axes),
        "points": [[f"train-{index}", *rest] for index, *rest in points],
        "shades": list(shades),
    }


def build_tables(
    section: str, title: str, lead: str, tables: Sequence[tuple[str, list[str], list[list[Any]]]]
) -> Section:
    """Plain tables.

    Args:
        section: name of the section, for links.
        title: its title.
        lead: what it shows.
        tables: heading, columns and rows of each.

    Returns:
        The section.
    """
    parts = [{"title": name, "columns": columns, "rows": rows} for name, columns, rows in tables]
    return {"kind": "table", "id": section, "title": title, "lead": lead, "tables": parts}


def _explain(measurement: str) -> str:
    how = (
        "Each card is one prediction of the model (the query, on the left) and the training examples that "
        "bear on it most."
    )
    if measurement == "loss":
        return (
            f"{how} Blue ones helped: without them the model would do worse on the query. Orange ones hurt: "
            "without them it would do better. The number is the predicted change of the query's loss if the "
            "example were removed and the model trained again."
        )
    return (
        f"{how} Without the blue ones its {measurement} would rise, without the orange ones it would fall. "
        f"The number is the predicted change of the {measurement} if the example were removed and the model "
        "trained again."
    )


def _word(measurement: str) -> dict[str, Any]:
    what = "the loss on this query" if measurement == "loss" else f"the {measurement} of this query"
    if measurement == "loss":
        top, bottom = ("Helped most", "proponents"), ("Hurt most", "opponents")
    else:
        top = (f"Lowered the {measurement}", f"without them the {measurement} rises")
        bottom = (f"Raised the {measurement}", f"without them the {measurement} falls")
    return {
        "top": {"title": top[0], "explanation": top[1]},
        "bottom": {"title": bottom[0], "explanation": bottom[1]},
        "rises": f"{what} would rise",
        "falls": f"{what} would fall",
    }
