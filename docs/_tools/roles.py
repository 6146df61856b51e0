"""An extension of Griffe: Sphinx roles and formulas in docstrings become Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`(?:([^`<]+) <)?(~?)([^`<>]+)>?`")
_FORMULA = re.compile(r"^( *)\.\. math:: ?(.*(?:\n\1 +\S.*)*)", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites the docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring of the package."""
        _rewrite(pkg)


def _rewrite(item: griffe.Object | griffe.Alias) -> None:
    if item.is_alias:
        return
    if item.docstring is not None:
        text = item.docstring.value
        text = _FORMULA.sub(_to_formula, text)
        text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
        item.docstring.value = _ROLE.sub(_to_link, text)
    for member in item.members.values():
        _rewrite(member)


def _to_formula(found: re.Match[str]) -> str:
    formula = " ".join(found[2].split())
    return textwrap.indent(f"\n$$\n{formula}\n$$\n", found[1])


def _to_link(found: re.Match[str]) -> str:
    """A link where the target is documented, else its name alone."""
    title, short, target = found.groups()
    name = title or (target.rpartition(".")[2] if short else target)
    path = target if "." in target else f"lightning_influence.{target}"
    return f'<autoref optional identifier="{path.lstrip(".")}"><code>{name}</code></autoref>'
