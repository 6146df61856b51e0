"""A hook of MkDocs: formulas become MathML when the site is built, so that no script has to be loaded."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas that ``pymdownx.arithmatex`` found on a page.

    Args:
        content: the page as HTML.

    Returns:
        The page with MathML.
    """
    return _FORMULA.sub(_convert, content)


def _convert(found: re.Match[str]) -> str:
    formula = html.unescape(found[2]).strip()
    for start, end in ((r"\(", r"\)"), (r"\[", r"\]")):
        formula = formula.removeprefix(start).removesuffix(end)
    display = "block" if found[1] == "div" else "inline"
    return str(convert(formula.strip(), display=display))
