"""Facts and tables as rich objects, plain text and Markdown."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text


def score_caption(measurement: str) -> str:
    """What a score's sign and unit mean.

    Args:
        measurement: what was measured on the queries.

    Returns:
        A sentence for the foot of a table.
    """
    unit = f"Score: predicted change of the {measurement} when the training example is removed"
    if measurement == "loss":
        return f"{unit}; positive: the example helps the query, negative: it hurts."
    return f"{unit}; positive: the {measurement} rises without the example."


def describe_group(name: str, count: int, *, mark: str = "\n", what: str = "") -> str:
    """What a row is that is one query or the mean of several.

    Args:
        name: of the group.
        count: how many queries it has.
        mark: between the name and the count.
        what: after the count.

    Returns:
        The name, and of how many queries it is the mean if they are more than one.
    """
    return name if count == 1 else f"{name}{mark}mean of {count:,}{what}"


def build_facts_table(facts: Iterable[tuple[str, str]], title: str) -> Table:
    """A table of names and values.

    Args:
        facts: pairs of name and value, shown in full and as they are (no markup).
        title: the heading.

    Returns:
        A rich table.
    """
    table = Table(title=title, show_header=False, box=None, title_justify="left")
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    return table


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    r"""A Markdown table.

    Args:
        columns: the headings.
        rows: the cells; anything with a text.

    Returns:
        The table, one line per row.

    Example:
        >>> print(markdown_table(["a"], [["x|y"]]))
        | a |
        | --- |
        | x\|y |
    """
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _escape(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\r", " ").replace("\n", "<br>")


def render_plain(renderable: RenderableType, width: int = 100) -> str:
    """A rich object as text without colours.

    Args:
        renderable: what to render.
        width: columns of text.

    Returns:
        The text, without trailing spaces.
    """
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(
        renderable
    )
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())
