"""Walks along autograd graphs, from a loss back to what it is made of."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal


def walk(
    roots: Any, stops: Collection[Any], activations: Collection[Any]
) -> tuple[list[Any], set[Any], Literal["call", "leaf", "layer"]]:
    """Walk an autograd graph back from some nodes, up to others.

    Args:
        roots: a node, or several, to begin at.
        stops: nodes beyond which not to look.
        activations: nodes at which the walk ends too.

    Returns:
        The stops that were met; the nodes passed on the way, without leaves; what was met beside the stops:
        an activation, or else a leaf, or nothing.
    """
    todo = list(roots) if isinstance(roots, list) else [roots]
    met: list[Any] = []
    passed: set[Any] = set()
    seen: set[Any] = {None, *todo}
    ends: Literal["call", "leaf", "layer"] = "call"
    while todo:
        node = todo.pop()
        if node in stops:
            met.append(node)
        elif node in activations:
            ends = "layer"
        elif not node.next_functions:
            ends = "leaf" if ends == "call" else ends
        else:
            passed.add(node)
            for following, _ in node.next_functions:
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
    return met, passed, ends
