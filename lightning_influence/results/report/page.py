"""A page as one file: data in an escaped block of JSON, style and script within, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lightning_influence.results.report.material import Material, ReportOptions
from lightning_influence.support.arguments import parse_options
from lightning_influence.support.storage import PathLike, write_atomically

Section = dict[str, Any]


def read_options(given: Mapping[str, Any]) -> Material:
    """Read what a user passed to a report.

    Args:
        given: fields of :class:`ReportOptions` by name.

    Returns:
        The examples to show, none of which is looked up yet.

    Raises:
        TypeError: if there is no such field, or a value is of a wrong type.
        ValueError: if a value is out of range.
        ImportError: if Jinja2 is not installed, before anything is computed.
    """
    _import_jinja()
    return Material(parse_options(ReportOptions, given))


def write_page(
    path: PathLike, material: Material, heading: str, lead: str, sections: Sequence[Section | None]
) -> Path:
    """Write a page, atomically.

    Args:
        path: the file, used as it stands; an existing one is replaced.
        material: the examples that the sections name by their keys.
        heading: of the page, where the options have none.
        lead: what the page is, in a sentence or two.
        sections: what it holds, in order; None stands for nothing.

    Returns:
        The path.

    Raises:
        ImportError: if Jinja2 is not installed.
        OSError: if the file cannot be written.
    """
    present = [section for section in sections if section is not None]
    title = material.options.title or heading
    note = material.warn()
    data = {
        "title": title,
        "lead": lead,
        "notes": [] if note is None else [note],
        "examples": material.examples,
        "sections": present,
    }
    text = render_page(title, data)
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path).expanduser()


def render_page(title: str, data: Mapping[str, Any]) -> str:
    """A page as text.

    Args:
        title: of the browser's window.
        data: JSON values; numbers that are not finite become null.

    Returns:
        The HTML.
    """
    folder = resources.files(__package__)
    style, script = (folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    jinja = _import_jinja()
    environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined)
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    # A lone surrogate has no UTF-8; in the JSON it is an escape sequence.
    heading = title.encode("utf-8", "replace").decode("utf-8")
    text: str = template.render(
        title=heading,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=escape_json(data),
    )
    return text


def escape_json(data: Any) -> str:
    r"""JSON that can stand in a ``<script>`` element, whatever texts it holds.

    Only ASCII comes out, and no ``<``, ``>`` or ``&``: neither ``</script>`` nor ``<!--`` can end or change
    the element, and reading it gives the same texts again.

    Args:
        data: JSON values with keys of any kind that JSON turns into text.

    Returns:
        The text.

    Example:
        >>> escape_json({"a": "</script>"})
        '{"a":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(_finite(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        # Six digits: more would not be seen, and make the file larger.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _import_jinja() -> Any:
    """Return jinja2.

    Raises:
        ImportError: if it is not installed, naming the extra.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("reports need Jinja2: pip install 'lightning-influence[report]'") from error
    return jinja2
